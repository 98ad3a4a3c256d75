"""The embedded digits."""

import numpy as np

from nfzoo.data.digits import Digits


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits = Digits.embedded()
    pixels, labels = load_digits(return_X_y=True)
    assert np.array_equal(digits.images.reshape(1797, 64), pixels)
    assert np.array_equal(digits.labels, labels)
    image, label = digits[3]
    assert (image.size, image.mode, label) == ((32, 32), "L", 3)
    assert np.asarray(image).max() > 200
