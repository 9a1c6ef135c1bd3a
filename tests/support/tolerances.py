"""How far a step may be from what a test compares it with, beside what is promised (npu_fuse_pass.tolerances).

One row for each pair, and why it is not smaller.
"""

from __future__ import annotations

import torch

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# A compiled rule beside the eager one, some steps in a row: ten times what one step is allowed.
RULE = {F64: 1e-13, F32: 1e-5}
# An optimizer as a paper has it, a step beside eager: ATen's float32 norms are 1e-7 off themselves, quotients twice.
PAPER = {F64: 1e-14, F32: 2e-6}
# A step of GE's dedicated operation, by the dtype of its numbers: it computes 1 - beta2 and 1 - beta2_power itself,
# which is 1.3e-5 off for 0.999 in float32; with numbers in float64 the tensors' float32 is left.
DEDICATED = {F64: 2e-6, F32: 2e-5}
# A class of torch.optim on an NPU, some steps: it rounds every operation to half precision; where eager torch rounds
# once (addcmul, lerp, add with alpha) GE rounds twice. Every step adds some units in the last place of each operand.
STOCK_NPU = {F32: 1e-6, F16: 1e-2, BF16: 8e-2}
# Adadelta likewise: it takes the root of what it adds to eps = 1e-6, where float16 has steps of 6e-8: six percent.
ADADELTA_NPU = {**STOCK_NPU, F16: 5e-2}
# torch_npu.optim, six steps: in float16 it computes in it, ours in float32; some units in the last place for each step.
TORCH_NPU = {F32: 2e-6, F16: 2e-2}
# A short training of a small language model beside float64, times an eager one's distance: attention enlarges roundings
# of 1e-7 to 1e-5 of a number in four steps, in either; measured are 0.86 to 1.003 of eager's.
AS_NEAR = 1.1
# Muon, by the word in its source for the dtype of its iterations: of what they give, which is in the order of 1. Five
# of them magnify small singular values up to 3.4445**5 times; in bfloat16 (2**-8) that says little.
MUON_NPU = {"bfloat16": 0.1, "float": 1e-5}
