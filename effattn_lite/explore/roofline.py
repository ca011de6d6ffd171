"""Interactive figure of book/foundations/attention_cost.md: reading and writing a text, under one roof."""

from effattn_lite import data
from effattn_lite.explore.figure import Explorable

MODELS = (
    dict(name="Llama 3.2 1B", L=16, D=2048, H=32, HKV=8, K=64, F=8192, vocab=128256, tied=True),
    dict(name="Llama 3.1 8B", L=32, D=4096, H=32, HKV=8, K=128, F=14336, vocab=128256, tied=False),
    dict(name="Llama 3.1 70B", L=80, D=8192, H=64, HKV=8, K=128, F=28672, vocab=128256, tied=False),
)
"""Published sizes: layers, width, query and key heads, head size, MLP width, vocabulary; tied embeddings."""

SHEETS = (
    dict(name="A100 80 GB, data sheet", copy=2.039, product=312, memory=80),
    dict(name="T4, data sheet", copy=0.320, product=65, memory=16),
)
"""TB/s, TFLOP/s in 16 bits and GB, as the maker states them."""

MEMORY = {"H100": 80, "H200": 141}
"""GB of the cards that a record may come from."""

CONTEXTS = [2**n for n in range(10, 21)]


class Roofline(Explorable):
    """Prefill and decode of a language model on a roofline; milliseconds a token; bytes of the cache.

    All numbers are floors: every byte moved once at the copy rate, every product at the product rate.

    Args:
        model: a name in MODELS.
        machine: 0 is the GPU of the recorded run, with its measured rates; then those of SHEETS.
        batch: texts decoded together: a power of two up to 512.
        context: tokens of each text, a power of two between 1,024 and 1,048,576.
        kv_heads: key/value heads; default the model's own.
        size: bytes of a stored number: 2, 1 or 0.5.
    """

    name = "roofline"
    alt = (
        "A roofline: speed against FLOPs a byte for reading a prompt and for writing a token, attention and "
        "weights apart. Below it the time of a token against the length of the text, and the memory in use."
    )

    def __init__(self, model="Llama 3.1 8B", machine=0, batch=1, context=131072, *, kv_heads=None, size=2):
        names = [m["name"] for m in MODELS]
        if model not in names:
            raise ValueError(f"model is {model!r}, expected one of {names}")
        run = data.results("softmax_attention")
        card = next(card for card in MEMORY if card in run["device"])
        measured = dict(
            name=f"{card} {MEMORY[card]} GB, measured {run['date']}",
            copy=run["ceilings"]["copy_tb_s"],
            product=run["ceilings"]["product_tflop_s"],
            memory=MEMORY[card],
        )
        chosen = names.index(model)
        super().__init__(
            models=MODELS,
            model=chosen,
            machines=[measured, *SHEETS],
            machine=machine,
            batch=batch,
            context=context,
            contexts=CONTEXTS,
            kv=kv_heads or MODELS[chosen]["HKV"],
            size=size,
        )
