import pytest

from sparse_cl import models, probes


@pytest.mark.parametrize("name", probes._MOVED_TO_MODELS)
def test_a_name_that_moved_still_comes_and_says_where_it_is(name):
    with pytest.warns(DeprecationWarning, match=rf"probes\.{name} has moved; import sparse_cl\.models\.{name}"):
        assert getattr(probes, name) is getattr(models, name)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="sparse_cl.probes.*no attribute 'anything'"):
        _ = probes.anything
