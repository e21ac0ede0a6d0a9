import torch

from distill_core.networks.refinement import RefinementConfig, RefinementHead


def head():
    torch.manual_seed(0)
    return RefinementHead(RefinementConfig(width=16, blocks=1), 4)


def test_the_head_begins_as_the_identity_and_can_leave_it():
    refine, latents = head(), torch.randn(2, 4, 6, 5)
    assert torch.equal(refine(latents), latents)
    (refine(latents) - 1).square().mean().backward()
    assert refine.leave.weight.grad.abs().sum() > 0


def test_every_place_hears_of_every_other():
    refine, latents = head(), torch.randn(1, 4, 12, 12, requires_grad=True)
    torch.nn.init.normal_(refine.leave.weight)
    refine(latents)[0, 0, 0, 0].backward()
    assert (
        latents.grad[0].abs().sum(0) > 0
    ).all()  # through the attention: convolutions alone reach a part of it
