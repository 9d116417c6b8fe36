"""The loops of codec spectral: transform, quantization, packing, rate."""
