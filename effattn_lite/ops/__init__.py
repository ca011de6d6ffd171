"""Public ops, one function a method; importing this loads torch, never triton."""
