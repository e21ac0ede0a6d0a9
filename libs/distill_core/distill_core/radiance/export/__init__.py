"""Scenes as files that other programs read, all in the frame of the input: the capture's, not the training box's."""
