"""Diffusion samplers as tables of float64 coefficients."""
