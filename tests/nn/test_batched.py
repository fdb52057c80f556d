import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysys.nn.batched import cnn, mlp, softmax_regression

MODELS = {
    "softmax": softmax_regression((1, 8, 8), 10),
    "mlp": mlp((1, 8, 8), 10, 17),
    "cnn": cnn((3, 9, 8), 10, 4),
}
SHAPES = {"softmax": (1, 8, 8), "mlp": (1, 8, 8), "cnn": (3, 9, 8)}


def alone(model, theta, x, y):
    """Loss gradient of one node through the plain torch module."""
    module = model.module()
    torch.nn.utils.vector_to_parameters(theta, module.parameters())
    F.cross_entropy(module(x), y).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_batched_gradients_equal_the_plain_module_node_by_node(name):
    model, k, b = MODELS[name], 5, 7
    generator = torch.Generator().manual_seed(0)
    theta = torch.stack([model.init(generator) for _ in range(k)])
    x = torch.rand(k, b, *SHAPES[name], generator=generator)
    y = torch.randint(0, 10, (k, b), generator=generator)
    leaf = theta.clone().requires_grad_(True)
    logits = model.logits(leaf, x)
    F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(k, b).mean(1).sum().backward()
    for i in range(k):
        torch.testing.assert_close(leaf.grad[i], alone(model, theta[i], x[i], y[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_dimension_is_the_module_s_parameter_count(name):
    assert MODELS[name].dimension == sum(p.numel() for p in MODELS[name].module().parameters())


def test_initialisation_lies_within_fan_in_bounds():
    theta = MODELS["mlp"].init(torch.Generator().manual_seed(1))
    first = theta[: 17 * 64].numpy()
    assert np.abs(first).max() <= 1 / 8
    assert np.abs(first).max() > 0.12


def test_cnn_refuses_what_is_not_an_image():
    with pytest.raises(ValueError, match="images of at least 4x4"):
        cnn((30,), 2, 4)
