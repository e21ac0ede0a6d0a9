"""Scenes that can be saved, loaded and looked at: fields, latent fields, relightable ones, Gaussians."""
