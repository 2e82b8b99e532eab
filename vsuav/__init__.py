"""Temporal diffusion video upscaling for VapourSynth."""
