"""Interactive figures: one ES module each, live in Jupyter and Colab, standing alone in the built page.

`from effattn_lite.explore import MethodMap` loads one figure; NumPy alone is imported.
"""

from importlib import import_module

MODULES = {
    "AttentionShapes": "attention_shapes",
    "AttentionSinks": "attention_sinks",
    "BiasLine": "bias_line",
    "CarriedSurprise": "carried_surprise",
    "DecayClocks": "decay_clocks",
    "DeltaDial": "delta_dial",
    "Drawers": "drawers",
    "FactBoard": "fact_board",
    "FeatureCloud": "feature_cloud",
    "ForgetGates": "forget_gates",
    "HybridComposer": "hybrid_composer",
    "InnerModel": "inner_model",
    "KernelView": "kernel_view",
    "LaunchGrid": "launch_grid",
    "MethodMap": "method_map",
    "OnlineLearner": "online_learner",
    "OnlineSoftmax": "online_softmax",
    "Poles": "poles",
    "RateDial": "rate_dial",
    "Roofline": "roofline",
    "SegmentPlan": "segment_plan",
    "Semiseparable": "semiseparable",
    "ShoutingGate": "shouting_gate",
    "Squeeze": "squeeze",
    "ThreeForms": "three_forms",
}
"""Class of a figure -> the module of this folder that has it."""

__all__ = sorted(MODULES)


def __getattr__(name):
    if name not in MODULES:
        raise AttributeError(f"no figure is called {name!r}; there are: {', '.join(__all__)}")
    return getattr(import_module(f"effattn_lite.explore.{MODULES[name]}"), name)


def __dir__():
    return __all__
