"""Generated multi-tensor kernels for an NPU's vector cores: MLIR text that Ascend's own compiler takes."""
