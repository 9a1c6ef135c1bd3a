"""The NPU lowering: steps as GE graphs through torchair. Only this room imports torch_npu and torchair."""
