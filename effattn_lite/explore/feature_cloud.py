"""Interactive figure of book/linear/random_features.md: estimates of one weight, by three kinds of draw."""

from effattn_lite.explore.figure import Explorable


class FeatureCloud(Explorable):
    """Estimates of e^(q . k) by random features, around the true value; below, what the theory says of them.

    Args:
        angle: between query and key, degrees, 0 to 180.
        length: of both vectors, after division by K^(1/4), one of 0.5, 0.75, ..., 3.
        features: M of every estimate, one of 4, 16, 64, 256, 1024; sine and cosine are two features.
        seed: of the first draw.
    """

    name = "feature_cloud"
    alt = (
        "Three rows of dots, each dot one estimate of a weight divided by the true weight: by independent "
        "positive features, by orthogonal positive features, and by sines and cosines. A curve below shows "
        "the typical relative error against the angle between query and key; the angle can be dragged."
    )

    def __init__(self, angle=90, length=1.5, features=64, seed=1):
        super().__init__(
            angle=angle,
            length=length,
            lengths=[0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3],
            features=features,
            counts=[4, 16, 64, 256, 1024],
            seed=seed,
            draws=200,
            width=16,
        )
