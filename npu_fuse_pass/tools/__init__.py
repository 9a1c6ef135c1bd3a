"""Entry points for users: compile_step, explain, the commands of `python -m npu_fuse_pass`."""
