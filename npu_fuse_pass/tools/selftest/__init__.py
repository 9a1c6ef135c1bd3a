"""`python -m npu_fuse_pass selftest`: environment, parity and times on somebody's own device, in one report."""
