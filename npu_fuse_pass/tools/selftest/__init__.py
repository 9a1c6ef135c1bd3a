"""`python -m npu_fuse_pass selftest`: environment, parity and times on this machine's device, in one report."""
