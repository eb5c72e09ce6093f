"""Requests, scheduling, the engine and the TorchServe handler."""
