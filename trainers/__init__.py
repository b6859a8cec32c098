"""Trains LoRAs for video models: plain Python that knows nothing of ComfyUI. See `family.py` for the contract of a model."""

__version__ = "0.1.0"
