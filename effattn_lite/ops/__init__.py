"""Public ops, one function a method; importing this loads torch, never triton."""

from effattn_lite.ops.block_streaming import block_streaming
from effattn_lite.ops.lightning_attention import lightning_attention
from effattn_lite.ops.retnet import retnet
from effattn_lite.ops.rwkv5 import rwkv5
from effattn_lite.ops.sliding_window import sliding_window
from effattn_lite.ops.softmax_attention import softmax_attention
from effattn_lite.ops.streaming_llm import streaming_llm
