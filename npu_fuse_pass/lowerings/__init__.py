"""Lowerings: how a rewritten step runs on a platform."""
