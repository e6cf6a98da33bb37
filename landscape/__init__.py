"""Probes of loss landscapes and feature maps for any PyTorch vision model."""
