"""Steps as GE graphs through torchair. The only room that imports torch_npu and torchair."""
