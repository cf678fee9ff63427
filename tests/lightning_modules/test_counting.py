"""Networks that are conditioned on n-grams: counted where training begins, one left out after."""

from functools import partial

import pytest
import torch

from datamodules import FullRankDataModule
from dflows import flows
from dflows.backbones import LSTM, LevelConvolution
from dflows.bases import NGramBase
from dflows.bijections import ModularAffine
from dflows.errors import UserError
from dflows.experts import leave_one_out
from dflows.ngrams import NGrams
from dflows.orderings import Natural, Strided
from lightning_modules import Auxiliary, FlowModule, LanguageModel, Optimization
from tests.dflows.small import shaken, states
from tests.training import trainer

NETWORK = partial(LevelConvolution, width=8, layers=1, distances=(1, 4), window=2)
D = 16


def language_model(num_classes):
    return LanguageModel(
        flows.language_model(num_classes, D, NETWORK, ordering=Strided(4), ngram_order=3)
    )


def flow_module(num_classes, **options):
    return FlowModule(flows.strided(num_classes, D, 4, NETWORK, ngram_order=3), **options)


def both(num_classes):
    """An expert next to the data, and a counted base beneath."""
    base = partial(NGramBase, order=2)
    flow = flows.strided(num_classes, D, 4, NETWORK, ngram_order=3, base=base)
    return FlowModule(flow, base_count_windows=10)


MODULES = pytest.mark.parametrize("make", [language_model, flow_module])


def grams_of(module):
    (ngrams,) = (part for part in module.modules() if isinstance(part, NGrams))
    return ngrams


@MODULES
def test_they_are_counted_once_on_the_whole_training_text(make, text, tmp_path, monkeypatch):
    module = make(text.num_classes)
    assert not grams_of(module).num_counted
    trainer(tmp_path).fit(module, datamodule=text)
    assert grams_of(module).num_counted == text.characters("train")
    expected = NGrams(text.num_classes, 3)
    expected.count(text.training_chunks())
    assert torch.equal(grams_of(module).keys, expected.keys)
    monkeypatch.setattr(NGrams, "count", lambda *_: pytest.fail("counted again"))
    trainer(tmp_path, steps=6).fit(module, datamodule=text)


@MODULES
def test_a_checkpoint_holds_them(make, text, tmp_path):
    module = make(text.num_classes)
    run = trainer(tmp_path)
    run.fit(module, datamodule=text)
    run.save_checkpoint(tmp_path / "some.ckpt")
    other = make(text.num_classes)
    state = torch.load(tmp_path / "some.ckpt", weights_only=True)["state_dict"]
    other.load_state_dict(state)
    y = torch.randint(text.num_classes, (3, D))
    module.eval(), other.eval()
    torch.testing.assert_close(other.flow.log_prob(y), module.flow.log_prob(y))


def test_a_language_model_begins_as_they_are(text, tmp_path):
    module = language_model(text.num_classes)
    module.flow.base.init_from_counts(text.class_counts())
    grams_of(module).count(text.training_chunks())
    y = next(iter(text.val_dataloader()))
    scores = module.eval().flow.base.log_prob(y)
    # Nothing is known ahead of the last row, whose left end is the end of what is known.
    expected = grams_of(module).log_prob(y[:, -4:])
    torch.testing.assert_close(scores[:, -4:], expected.float())
    expert, levels = module.conditioner.expert, Strided(4).levels(D)
    known = expert(y, levels, num_terms=expert.num_terms(levels)).sum(dim=-1)
    expected = known.log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores, expected.float())


@pytest.mark.parametrize("training", [False, True])
@MODULES
def test_probabilities_sum_to_1(make, training):
    torch.manual_seed(0)
    module = shaken(make(2)).train(training)
    grams_of(module).count([torch.randint(2, (60,))])
    with torch.no_grad():
        parts = [module.flow.log_prob(part).double() for part in states(2, D).split(4096)]
    assert torch.cat(parts).exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_training_leaves_out_what_was_counted(training, text):
    module = shaken(language_model(text.num_classes)).train(training)
    grams_of(module).count(text.training_chunks())
    y = next(iter(text.train_dataloader()))
    whole, objective = module.flow.log_prob(y), module.evaluate_objective(y)
    assert torch.allclose(whole, objective) is not training


def test_the_iterations_that_an_expert_drafts_are_reported_as_such(text):
    for order, remark in ((None, "mean of 4"), (3, "mean of 4, drafted by the expert")):
        flow = flows.language_model(text.num_classes, D, NETWORK, ngram_order=order)
        (row,) = [
            row
            for row in FlowModule(flow).report_generation(D).rows
            if row[0] == "iterations of the fixed point"
        ]
        assert row[2].endswith(remark)


def test_samples_are_those_of_the_fixed_point(text, tmp_path):
    module = language_model(text.num_classes)
    trainer(tmp_path).fit(module, datamodule=text)
    module.eval()
    draws = [
        module.sample(3, generator=torch.Generator().manual_seed(1), method=method)
        for method in ("levels", "fixed_point")
    ]
    assert torch.equal(*draws)


def test_auxiliary_losses_leave_out_what_was_counted_too(text):
    network = partial(LSTM, width=8)
    flow = flows.language_model(text.num_classes, D, network, ngram_order=3)
    module = LanguageModel(flow, auxiliary=Auxiliary(layers=False))
    module = shaken(module).train()
    grams_of(module).count(text.training_chunks())
    y = next(iter(text.train_dataloader()))
    with leave_one_out():
        expected = module.flow.log_prob(y)
    torch.testing.assert_close(module.evaluate_objective(y), expected)
    assert not torch.allclose(expected, module.flow.log_prob(y))


def test_a_refitted_base_sees_what_is_left_of_unseen_text(text, tmp_path):
    module = flow_module(
        text.num_classes, optimization=Optimization(learning_rate=1e-9), base_refit_every=1
    )
    y = next(iter(text.train_dataloader()))
    trainer(tmp_path, steps=1, limit_val_batches=0).fit(module, datamodule=text)
    with leave_one_out(counted=True):
        unseen = module.flow.residuals(y)[-1]
    torch.testing.assert_close(module.base_refit.counts, module.flow.base.count(unseen))
    assert not torch.equal(unseen, module.flow.residuals(y)[-1])


def test_an_expert_is_counted_before_the_base_beneath(text, tmp_path, monkeypatch):
    module = both(text.num_classes)
    base = module.flow.base.ngrams
    (expert,) = (part for part in module.modules() if isinstance(part, NGrams) and part is not base)
    order, count = [], NGrams.count

    def note(ngrams, chunks):
        order.append("base" if ngrams is base else "expert")
        count(ngrams, chunks)

    monkeypatch.setattr(NGrams, "count", note)
    run = trainer(tmp_path, steps=4, limit_val_batches=1)
    run.fit(module, datamodule=text)
    # Anew before each of two validations, not before the sanity check.
    assert order == ["expert", "base", "base", "base"]
    assert expert.num_counted == text.characters("train")
    assert base.num_counted == 10 * D
    rows = torch.cat([*text.training_batches(10)])
    with leave_one_out(counted=True):
        unseen = module.flow.residuals(rows)[-1]
    expected = NGrams(text.num_classes, 2)
    expected.count([unseen])
    # The last validation came after the last step.
    assert torch.equal(base.keys, expected.keys)
    assert torch.equal(base.counts, expected.counts)


def test_data_without_a_text_are_refused(tmp_path):
    data = FullRankDataModule(D, 2, batch_size=4, eval_batch_size=4, eval_examples=8)
    with pytest.raises(UserError, match="no text to count them on: leave ngram_order away"):
        trainer(tmp_path).fit(flow_module(2), datamodule=data)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="logits of the classes themselves"):
        flows.stack(3, D, [Natural()], NETWORK, ModularAffine, ngram_order=2)
    with pytest.raises(UserError, match="there is no transform to condition on"):
        flows.stack(3, D, [], NETWORK, ngram_order=2)
    with pytest.raises(UserError, match="order is 40: give 1 to 32"):
        flows.language_model(3, D, NETWORK, ngram_order=40)
    base = flows.AutoregressiveFactory(NETWORK(), ngram_order=3)
    flow = flows.stack(3, D, [Natural()], NETWORK, base=base)
    with pytest.raises(UserError, match="a AutoregressiveBase that transforms stand on"):
        FlowModule(flow)
