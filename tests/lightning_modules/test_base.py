"""The base module: what users subclass."""

import math

import pytest
import torch
from pytorch_lightning.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dflows.errors import NonFiniteError, UserError
from lightning_modules import BaseModule, Optimization
from lightning_modules.base import DEFAULT_OPTIMIZATION
from lightning_modules.divergence import FiniteWatch
from tests.training import trainer

K, D = 3, 4


class Unigram(BaseModule):
    """The least that a user writes."""

    def __init__(self, optimization=DEFAULT_OPTIMIZATION):
        super().__init__(optimization)
        self.logits = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))
        self.body = nn.Sequential(nn.Embedding(K, 2), nn.LayerNorm(2), nn.Linear(2, 2))

    def evaluate_objective(self, batch):
        unused = sum(parameter.sum() for parameter in self.body.parameters())
        return self.log_prob(batch) + 0 * unused

    def log_prob(self, batch):
        return self.logits.log_softmax(-1)[self.indices_of(batch)].sum(-1)

    def sample(self, num_samples, *, length=None, temperature=1.0, generator=None, method="levels"):
        probs = (self.logits / temperature).softmax(-1).expand(num_samples, -1)
        return probs.multinomial(length or D, replacement=True, generator=generator)

    def base_parameters(self):
        return [self.logits]


class Silent(Unigram):
    """Steps without a trainer, who keeps the log."""

    def log(self, *arguments, **options):
        pass


class Watch(Callback):
    """Notes learning rates, and the base, after every step."""

    def __init__(self):
        self.rates, self.base, self.randomness = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.base.append(module.logits.detach().clone())
        self.randomness.append(torch.rand(()).item())


def batches(number, rows=2, length=D):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(K, (rows, length), generator=generator) for _ in range(number)]


def loader(number=10):
    return DataLoader(batches(number), batch_size=None)


def fit(module, folder, *, steps=6, watch=None, **options):
    watch = watch or Watch()
    given = {"val_check_interval": None, "check_val_every_n_epoch": 1, **options}
    run = trainer(folder, steps, **given | {"callbacks": [watch, *options.get("callbacks", [])]})
    run.fit(module, loader(), loader(3))
    return run, watch


class TestOptimization:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("learning_rate", 0.0),
            ("learning_rate", float("nan")),
            ("learning_rate", float("inf")),
            ("weight_decay", float("nan")),
            ("weight_decay", float("inf")),
            ("base_learning_rate", -1.0),
            ("weight_decay", -0.1),
            ("warmup_steps", -1),
            ("hold_base_steps", -1),
            ("betas", (0.9, 1.0)),
            ("schedule", "exponential"),
            ("cycles", 0),
            ("cycles", 2),
        ],
    )
    def test_bad_values_are_named(self, key, value):
        with pytest.raises(UserError, match=f"optimization.{key} is"):
            Optimization(**{key: value})

    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])],
    )
    def test_schedules(self, schedule, factors):
        settings = Optimization(schedule=schedule)
        found = [settings.factor(1000, progress) for progress in (0.0, 0.5, 1.0)]
        assert found == pytest.approx(factors)

    def test_warm_up(self):
        settings = Optimization(warmup_steps=4)
        assert [settings.factor(step, 0.0) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1, 1]

    @pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
    def test_a_cycle_is_a_whole_course(self, schedule):
        one = Optimization(schedule=schedule, warmup_steps=4)
        three = Optimization(schedule=schedule, warmup_steps=4, cycles=3)
        course = [one.factor(step, step / 20) for step in range(20)]
        assert [three.factor(step, step / 60) for step in range(60)] == pytest.approx(3 * course)
        assert three.factor(60, 1.0) == pytest.approx(one.factor(20, 1.0))


class TestOptimizer:
    def test_groups(self, tmp_path):
        settings = Optimization(learning_rate=0.1, base_learning_rate=0.2, weight_decay=0.3)
        run, _ = fit(Unigram(settings), tmp_path)
        module = run.lightning_module
        (optimizer,) = run.optimizers
        found = {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert len(found) == len(list(module.parameters()))
        assert found[id(module.logits)] == (0.2, 0.0)
        assert found[id(module.body[2].weight)] == (0.1, 0.3)
        for parameter in (module.body[0].weight, module.body[1].weight, module.body[2].bias):
            assert found[id(parameter)] == (0.1, 0.0)

    def test_the_learning_rate_falls_to_the_end_of_the_training(self, tmp_path):
        settings = Optimization(learning_rate=1.0, warmup_steps=2, schedule="linear")
        _, watch = fit(Unigram(settings), tmp_path, steps=5)
        assert [rates[0] for rates in watch.rates] == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])

    def test_the_learning_rate_falls_with_time(self, tmp_path):
        settings = Optimization(learning_rate=1.0, schedule="linear")
        _, watch = fit(
            Unigram(settings), tmp_path, steps=-1, max_time={"seconds": 1}, limit_val_batches=0
        )
        rates = [rates[0] for rates in watch.rates]
        assert rates[0] > 0.9
        assert rates[-1] < 0.1
        assert rates == sorted(rates, reverse=True)

    def test_a_schedule_needs_an_end(self, tmp_path):
        with pytest.raises(UserError, match=r"set trainer.max_steps or trainer.max_time"):
            fit(Unigram(Optimization(schedule="cosine")), tmp_path, steps=-1)

    def test_the_base_is_held(self, tmp_path):
        module = Unigram(Optimization(learning_rate=0.1, hold_base_steps=3))
        before = module.logits.detach().clone()
        _, watch = fit(module, tmp_path)
        held = [torch.equal(logits, before) for logits in watch.base]
        assert held == [True, True, True, False, False, False]

    @pytest.mark.parametrize(("clip", "by"), [(None, None), (1e-3, None), (1e-3, "value")])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
    def test_it_works_in_every_precision(self, tmp_path, precision, clip, by):
        options = {"gradient_clip_val": clip, "gradient_clip_algorithm": by}
        module = Unigram()
        run, watch = fit(module, tmp_path, precision=precision, **options)
        (optimizer,) = run.optimizers
        assert optimizer.defaults["fused"] == (by is None or "mixed" not in precision)
        gradients = nn.utils.parameters_to_vector([p.grad for p in module.parameters()])
        size = gradients.norm(torch.inf if by == "value" else 2)
        assert (size <= 1.01e-3) == (clip is not None)
        assert not torch.equal(watch.base[0], watch.base[-1])


class TestSteps:
    def test_the_loss_is_in_nats_a_dimension(self):
        module = Silent()
        (batch,) = batches(1)
        expected = -module.log_prob(batch).mean() / D
        assert module.training_step(batch, 0).item() == pytest.approx(expected.item())
        longer = batch.repeat(1, 3)
        assert module.training_step(longer, 0).item() == pytest.approx(expected.item())

    def test_metrics_are_exact_over_unequal_batches(self, tmp_path):
        module = Unigram()
        data = [*batches(2, rows=3), *batches(1, rows=1, length=2)]
        judge = trainer(tmp_path)
        for split, run in (("valid", judge.validate), ("test", judge.test)):
            (result,) = run(module, DataLoader(data, batch_size=None), verbose=False)
            nats = -sum(module.log_prob(batch).sum().item() for batch in data)
            assert result[f"{split}_bpc"] == pytest.approx(nats / math.log(2) / 26, rel=1e-6)
            assert result[f"{split}_nats"] == pytest.approx(nats / 7, rel=1e-6)
            assert module.scores[split].characters == 26
            assert module.scores[split].examples == 7

    def test_the_seed_decides_what_is_drawn_in_a_step(self, tmp_path):
        randomness = []
        for seed, batch_of_validation in ((1, 3), (1, 1), (2, 3)):
            torch.manual_seed(seed)
            _, watch = fit(Unigram(), tmp_path, limit_val_batches=batch_of_validation)
            randomness.append(watch.randomness)
        assert randomness[0] == randomness[1]
        assert randomness[0] != randomness[2]
        assert len(set(randomness[0])) == 6

    def test_a_batch_may_have_a_context(self):
        indices, context = torch.zeros(2, D, dtype=torch.long), torch.ones(2, 1)
        assert BaseModule.indices_of((indices, context)) is indices
        assert BaseModule.context_of((indices, context)) is context
        assert BaseModule.context_of(indices) is None


def test_the_state_of_training_is_kept(tmp_path):
    module, other = Silent(), Silent()
    module.trainer, other.trainer = trainer(tmp_path), trainer(tmp_path)
    module.training_step(batches(1)[0], 0)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    again = {}
    other.on_save_checkpoint(again)
    assert again == checkpoint
    other.on_load_checkpoint({})


class Diverging(Unigram):
    """A part of it is not finite from some step on."""

    def __init__(self, part, at=3, **options):
        super().__init__(**options)
        self.part, self.at, self.value = part, at, float("nan")

    def _reached(self):
        return self._trainer is not None and self.trainer.global_step >= self.at

    def evaluate_objective(self, batch):
        if self.part == "bijection" and self._reached():
            raise NonFiniteError("RankPermutation was given logits that are not finite")
        value = super().evaluate_objective(batch)
        if self.part == "gradient" and self._reached():
            # Of sqrt at 0 the value is finite, and its gradient is not.
            value = value + (0 * self.logits.sum()).sqrt()
        return value * self.value if self.part == "loss" and self._reached() else value

    def log_prob(self, batch):
        value = super().log_prob(batch)
        return value * self.value if self.part == "likelihood" and self._reached() else value


class TestDivergence:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ("loss", "the training diverged: the loss at step 3 is not finite: lower model.optim"),
            ("gradient", "the training diverged: a gradient at step 3 is not finite"),
            ("bijection", r"logits that are not finite \(in training, at step 3\)"),
        ],
    )
    def test_training_ends_at_the_step(self, tmp_path, part, message, value):
        module = Diverging(part)
        module.value = value
        checkpoints = [ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)]
        with pytest.raises(NonFiniteError, match=message):
            fit(module, tmp_path, callbacks=checkpoints, enable_checkpointing=True)
        assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
            f"epoch=0-step={step}.ckpt" for step in (1, 2, 3)
        ]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_an_evaluation_ends_and_nothing_is_kept_as_best(self, tmp_path, value):
        module = Diverging("likelihood", at=4)
        module.evaluate_objective = lambda batch: Unigram.log_prob(module, batch)
        module.value = value
        checkpoint = ModelCheckpoint(tmp_path, monitor="valid_bpc", filename="{step}")
        with pytest.raises(NonFiniteError, match="the valid likelihood at step 4 is"):
            fit(
                module,
                tmp_path,
                callbacks=[checkpoint],
                enable_checkpointing=True,
                val_check_interval=2,
                check_val_every_n_epoch=None,
            )
        assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]
        assert "valid" in module.scores

    @pytest.mark.parametrize(("split", "run"), [("valid", "validate"), ("test", "test")])
    def test_the_step_is_added_to_errors_of_evaluations(self, tmp_path, split, run):
        module = Unigram()

        def log_prob(batch):
            raise NonFiniteError("logits are nan")

        module.log_prob = log_prob
        part = "validation" if split == "valid" else "test"
        with pytest.raises(NonFiniteError, match=rf"logits are nan \(in {part}, at step 0\)"):
            getattr(trainer(tmp_path), run)(module, loader(2))

    def test_what_lies_on_a_device_is_asked_for_later(self):
        class Device(torch.Tensor):
            device = torch.device("meta")

        watch = FiniteWatch()
        for step, finite in ((0, True), (1, False), (2, False)):
            watch.note("the loss", torch.tensor(finite).as_subclass(Device), step)
        watch.note("a gradient", torch.tensor(True).as_subclass(Device), 2)
        with pytest.raises(NonFiniteError, match="the loss at step 1 is not finite"):
            watch.check()
        FiniteWatch().check()


class TestLength:
    @pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
    def test_the_learning_rate_never_grows_over_epochs_of_unknown_length(self, tmp_path, schedule):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(batches(4))

        module, watch = Unigram(Optimization(learning_rate=0.01, schedule=schedule)), Watch()
        run = trainer(
            tmp_path,
            steps=-1,
            max_epochs=3,
            val_check_interval=None,
            check_val_every_n_epoch=1,
            callbacks=[watch],
        )
        run.fit(module, DataLoader(Stream(), batch_size=None), loader(3))
        rates = [rates[0] for rates in watch.rates]
        assert len(rates) == 12
        assert rates == sorted(rates, reverse=True)
        assert 0 < rates[-1] <= rates[0] == pytest.approx(0.01)

    @pytest.mark.parametrize("schedule", ["cosine", "linear"])
    def test_it_falls_step_by_step_over_epochs_of_known_length(self, tmp_path, schedule):
        module, watch = Unigram(Optimization(learning_rate=0.01, schedule=schedule)), Watch()
        run = trainer(
            tmp_path,
            steps=-1,
            max_epochs=2,
            val_check_interval=None,
            check_val_every_n_epoch=1,
            callbacks=[watch],
        )
        run.fit(module, loader(5), loader(3))
        expected = [module.optimization.factor(n, n / 10) * 0.01 for n in range(10)]
        assert [rates[0] for rates in watch.rates] == pytest.approx(expected)
        assert module.progress(10**9) == 1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
class TestResume:
    @pytest.mark.parametrize("rate", [0.1, 0.5])
    def test_the_learning_rate_is_that_of_this_run(self, tmp_path, rate):
        path, watch = tmp_path / "some.ckpt", Watch()
        run = trainer(tmp_path, steps=3, limit_val_batches=0)
        run.fit(Unigram(Optimization(0.1, schedule="linear")), loader(), loader(3))
        run.save_checkpoint(path)
        module = Unigram(Optimization(rate, 0.2, weight_decay=0.3, betas=(0.5, 0.6)))
        run = trainer(tmp_path, steps=6, limit_val_batches=0, callbacks=[watch])
        run.fit(module, loader(), loader(3), ckpt_path=path)
        (optimizer,) = run.optimizers
        found = {
            (group["lr"], group["initial_lr"], group["weight_decay"], group["betas"])
            for group in optimizer.param_groups
        }
        assert found == {
            (rate, rate, 0.0, (0.5, 0.6)),
            (rate, rate, 0.3, (0.5, 0.6)),
            (0.2, 0.2, 0.0, (0.5, 0.6)),
        }
        assert len(watch.rates) == 3
        assert all(sorted({*rates}) == sorted({rate, 0.2}) for rates in watch.rates)

    def test_the_schedule_goes_on_at_its_step(self, tmp_path):
        path, watch = tmp_path / "some.ckpt", Watch()
        settings = Optimization(0.1, schedule="linear")
        run = trainer(tmp_path, steps=10, limit_val_batches=0, max_epochs=1, limit_train_batches=4)
        run.fit(Unigram(settings), loader(), loader(3))
        run.save_checkpoint(path)
        again = Optimization(1.0, schedule="linear")
        run = trainer(tmp_path, steps=10, limit_val_batches=0, callbacks=[watch])
        run.fit(Unigram(again), loader(), loader(3), ckpt_path=path)
        rates = [rates[0] for rates in watch.rates]
        assert rates == pytest.approx([(10 - step) / 10 for step in range(4, 10)])

    @pytest.mark.parametrize(
        "means",
        [
            {"exp_avg_sq": torch.zeros(1)},
            {"exp_avg": torch.zeros(())},
            {"exp_avg": torch.zeros(2, 1000)},
            {"exp_avg": torch.zeros(3, dtype=torch.long)},
            {"exp_avg": torch.zeros(3, device="meta")},
            {"exp_avg": torch.zeros(3).to_sparse()},
            {"exp_avg": "text"},
            {"step": torch.zeros(3)},
            {"step": 3},
            {"more": torch.zeros(3)},
            {},
        ],
        ids=str,
    )
    def test_running_means_of_other_kinds_are_refused(self, means, tmp_path):
        path = tmp_path / "some.ckpt"
        run = trainer(tmp_path, steps=2, limit_val_batches=0)
        run.fit(Unigram(), loader(), loader(3))
        run.save_checkpoint(path)
        content = torch.load(path, weights_only=True)
        state = content["optimizer_states"][0]["state"]
        assert state[0]["exp_avg"].shape == (3,)
        state[0] = {**state[0], **means} if means else {}
        torch.save(content, path)
        run = trainer(tmp_path, steps=4, limit_val_batches=0)
        with pytest.raises(
            UserError, match=r"is damaged: its optimizer has .* of the shape \(3,\)"
        ):
            run.fit(Unigram(), loader(), loader(3), ckpt_path=path)


class TestFinders:
    def test_a_learning_rate_is_found_and_used(self, tmp_path):
        module, watch = Unigram(Optimization(1e-3, schedule="linear", warmup_steps=2)), Watch()
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        run = trainer(tmp_path, steps=4, limit_val_batches=0, callbacks=[finder, watch])
        run.fit(module, loader(40), loader(3))
        found = finder.optimal_lr.suggestion()
        assert module.learning_rate == module.optimization.learning_rate == found != 1e-3
        rates = [rates[0] for rates in watch.rates]
        factors = [module.optimization.factor(step, step / 4) for step in range(4)]
        assert rates == pytest.approx([found * factor for factor in factors])

    def test_rates_that_diverge_end_the_search_and_not_the_run(self, tmp_path):
        class Fragile(Unigram):
            def evaluate_objective(self, batch):
                value = super().evaluate_objective(batch)
                rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
                return value * (math.nan if rates[0] > 0.1 else 1)

        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        module = Fragile(Optimization(1e-3))
        run = trainer(tmp_path, steps=4, limit_val_batches=0, callbacks=[finder])
        run.fit(module, loader(40), loader(3))
        assert run.global_step == 4
        assert 0 < module.learning_rate <= 0.1


class Saved(Unigram):
    """What Lightning's users do to have their arguments kept."""

    def __init__(self, rate, factor=1.0):
        super().__init__(Optimization(rate))
        self.save_hyperparameters()
        self.factor = factor


class Given(Unigram):
    """It is handed a network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


class TestLoad:
    def saved(self, module, folder):
        run = trainer(folder, steps=2, limit_val_batches=0)
        run.fit(module, loader(), loader(3))
        run.save_checkpoint(folder / "some.ckpt")
        return folder / "some.ckpt"

    def test_a_module_without_arguments(self, tmp_path):
        module = Unigram()
        found = Unigram.load_from_checkpoint(self.saved(module, tmp_path))
        assert torch.equal(found.logits, module.logits)
        assert found.training

    @pytest.mark.parametrize(
        "place", ["cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, _: storage]
    )
    def test_takes_what_lightnings_own_takes(self, place, tmp_path):
        path = self.saved(Unigram(), tmp_path)
        found = Unigram.load_from_checkpoint(path, map_location=place, weights_only=True)
        assert found.device.type == "cpu"

    def test_a_module_that_kept_its_arguments(self, tmp_path):
        path = self.saved(Saved(0.5), tmp_path)
        found = Saved.load_from_checkpoint(path, factor=2.0)
        assert (found.learning_rate, found.factor) == (0.5, 2.0)

    def test_a_network_that_was_handed_over_is_handed_over_again(self, tmp_path):
        module = Given(nn.Linear(2, 3))
        path = self.saved(module, tmp_path)
        message = r"Given\.load_from_checkpoint\(path, network=network\).*load_state_dict"
        with pytest.raises(UserError, match=message):
            Given.load_from_checkpoint(path)
        found = Given.load_from_checkpoint(path, network=nn.Linear(2, 3))
        assert torch.equal(found.network.weight, module.network.weight)
        with pytest.raises(UserError, match="do not fit the model"):
            Given.load_from_checkpoint(path, network=nn.Linear(3, 3))
        with pytest.raises(UserError, match="takes no foo: its arguments are network"):
            Given.load_from_checkpoint(path, network=nn.Linear(2, 3), foo=1)

    def test_an_abstract_class_cannot_be_made(self, tmp_path):
        with pytest.raises(UserError, match="BaseModule is abstract"):
            BaseModule.load_from_checkpoint(self.saved(Unigram(), tmp_path))

    @pytest.mark.parametrize("content", [b"nothing", None])
    def test_what_is_no_checkpoint_is_refused(self, tmp_path, content):
        path = tmp_path / "some.ckpt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"some\.ckpt"):
            Unigram.load_from_checkpoint(path)

    def test_code_in_it_is_not_run(self, tmp_path):
        class Touch:
            def __reduce__(self):
                return open, (str(tmp_path / "touched"), "w")

        torch.save({"state_dict": {}, "hyper_parameters": Touch()}, tmp_path / "some.ckpt")
        with pytest.raises(UserError):
            Unigram.load_from_checkpoint(tmp_path / "some.ckpt")
        assert not (tmp_path / "touched").exists()


def test_a_batch_may_be_what_any_loader_makes():
    indices, context = torch.zeros(2, D, dtype=torch.long), torch.ones(2, 1)
    (alone,) = DataLoader(TensorDataset(indices), batch_size=2)
    assert torch.equal(BaseModule.indices_of(alone), indices)
    assert BaseModule.context_of(alone) is None
    (both,) = DataLoader(TensorDataset(indices, context), batch_size=2)
    assert torch.equal(BaseModule.context_of(both), context)


def test_a_module_reports_what_it_was_scored_and_how_fast_it_generates(tmp_path):
    module = Unigram()
    trainer(tmp_path).test(module, loader(3), verbose=False)
    report = module.report("test")
    assert report.metrics["characters"] == {"test": 3 * 2 * D}
    assert report.metrics["examples"] == {"test": 6}
    assert report.metrics["test_nats"] == pytest.approx(
        report.metrics["test_bpc"] * D * math.log(2)
    )
    assert report.rows[0].remark == f"{3 * 2 * D} characters, exact"
    assert module.report_structure().metrics == {}
    timed = module.report_generation(D).metrics
    assert timed["generation_length"] == D
    assert 0 < timed["generation_seconds_1"] <= timed["generation_seconds_1_p95"]
    assert "generation_seconds_32" in timed
