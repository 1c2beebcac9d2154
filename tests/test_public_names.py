"""What `import fedsim` offers is what it says it offers."""

import fedsim


def test_every_public_name_can_be_had():
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fedsim, "train")
