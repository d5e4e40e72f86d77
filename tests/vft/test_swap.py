"""What bench/swap.py measures, on videos whose shares are known."""

import pytest
import swap
import torch


def test_a_share_is_that_of_the_way():
    own, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert swap.share(other, own, other) == 1 and swap.share(own, own, other) == 0
    # what is beside the way does not count
    aside = own + 0.25
    aside[:, 0] += 1
    aside[:, 1] -= 1
    assert swap.share(aside, own, other) == pytest.approx(0.25)


def test_the_first_tokens_are_those_of_the_other_clip():
    own, other = [torch.zeros(2, 4)], [torch.ones(2, 4)]
    assert swap.swapped(own, other, 3)[0].tolist() == [[1, 1, 1, 0]] * 2


class Model:
    """Shows the mean of its tokens as a grey picture."""

    class codec:
        decode = staticmethod(lambda z: z)

    def decode_latents(self, ids):
        return [i.float().mean(1)[None, :, None, None].expand(3, -1, 4, 4) for i in ids]


def test_shares_grow_with_the_tokens():
    ids = [torch.full((2, 4), n) for n in (0, 1, 3)]
    assert swap.shares(Model(), ids, [1, 2, 4]) == {
        k: pytest.approx((s, s)) for k, s in ((1, 0.25), (2, 0.5), (4, 1.0))
    }
