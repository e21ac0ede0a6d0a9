"""Light: spherical harmonics, environment maps and physically based shading."""
