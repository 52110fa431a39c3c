"""The engine on an NVIDIA GPU: fused kernels, FlashInfer attention, CUDA graphs."""
