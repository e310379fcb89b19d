"""What `import safety_mech` offers."""

import pytest

import safety_mech


def test_no_name_is_listed_twice() -> None:
    assert len(set(safety_mech.__all__)) == len(safety_mech.__all__)


@pytest.mark.parametrize("name", safety_mech.__all__)
def test_a_public_name_is_the_thing_of_that_name(name: str) -> None:
    thing = getattr(safety_mech, name)
    if callable(thing):
        assert thing.__name__ == name
    else:
        assert name.isupper(), "control: constants alone have no name of their own"
