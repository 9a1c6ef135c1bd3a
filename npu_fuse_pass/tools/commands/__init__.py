"""The commands of `python -m npu_fuse_pass`: one module each, with `add_arguments` and `run`."""
