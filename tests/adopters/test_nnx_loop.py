"""A training loop in the style of flax's NNX tutorials: model, optimizer and metrics through `nnx.jit`.

The loop evaluates a moving average of the parameters and of BatchNorm's statistics.
"""

import jax
import numpy as np
import optax
from flax import nnx
from helpers.comparisons import arrays
from reference import assert_follows

from target_nets import EMATarget

AVERAGED = nnx.Any(nnx.Param, nnx.BatchStat)  # not Dropout's key and counter
STEP_SIZE = 0.2


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model: Classifier, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


@nnx.jit
def train_step(
    model: Classifier,
    target: EMATarget[nnx.State],
    optimizer: nnx.Optimizer[Classifier],
    metrics: nnx.MultiMetric,
    batch: dict[str, np.ndarray],
) -> EMATarget[nnx.State]:
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)
    return target.update(nnx.state(model, AVERAGED))


def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    label = rng.integers(3, size=16)
    return {"image": rng.normal(size=(16, 4)).astype(np.float32) + label[:, None], "label": label}


def test_a_moving_average_of_parameters_and_statistics() -> None:
    model = Classifier(nnx.Rngs(0))
    target = EMATarget(nnx.state(model, AVERAGED), STEP_SIZE)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    rng = np.random.default_rng(0)

    online = [arrays(nnx.state(model, AVERAGED))]
    for _ in range(6):
        target = train_step(model, target, optimizer, metrics, make_batch(rng))
        online.append(arrays(nnx.state(model, AVERAGED)))
    assert_follows(target.params, online, STEP_SIZE)

    averaged = nnx.clone(model)
    nnx.update(averaged, target.params)
    averaged.eval()
    assert averaged(make_batch(rng)["image"]).shape == (16, 3)
    assert_follows(nnx.state(averaged, AVERAGED), online, STEP_SIZE)
