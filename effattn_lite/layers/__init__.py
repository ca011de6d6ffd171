"""Layers: the mixers as torch modules, projections and gates as their authors define them."""
