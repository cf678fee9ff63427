import pytest
import torch
from torch import nn

from dflows.backbones import (
    LSTM,
    MADE,
    Backbone,
    DilatedConvolution,
    LevelConvolution,
    Masked,
    Table,
    Transformer,
)
from dflows.bijections import RankPermutation
from dflows.conditioner import Conditioner, Context, evaluated_by
from dflows.decoding import decide_levels
from dflows.errors import UserError
from dflows.experts import leave_one_out
from dflows.ngrams import NGramExpert
from dflows.orderings import BehindContext, Blocks, Natural, Parity, Reversed, Strided
from dflows.representations import to_one_hot
from dflows.transforms import ConditionalTransform
from tests.dflows.small import ORDERINGS, WIDTH, markov, shaken, states

LENGTH, CLASSES = 5, 3
NATURAL = Natural()

CAUSAL = {
    "transformer": lambda _: Transformer(WIDTH, layers=2, heads=2),
    "convolution": lambda _: LevelConvolution(WIDTH, layers=2, distances=(1, 2), window=1),
    "made": lambda _: MADE(WIDTH, length=LENGTH + 3, hidden=32),
    "lstm": lambda _: LSTM(WIDTH),
    "table": lambda ordering: Table(WIDTH, CLASSES, LENGTH, ordering),
}
CASES = [
    pytest.param(name, ordering, id=f"{name}-{key}")
    for name in CAUSAL
    for key, ordering in ORDERINGS.items()
    if name != "lstm" or key in ("natural", "reversed")
]


def make(backbone, ordering=NATURAL, num_logits=4, **options):
    """A random conditioner; equal calls give equal ones."""
    torch.manual_seed(0)
    if backbone == "masked":
        backbone = DilatedConvolution(WIDTH, layers=2)
    if isinstance(backbone, str):
        backbone = CAUSAL[backbone](ordering)
    conditioner = Conditioner(CLASSES, LENGTH, ordering, backbone, num_logits, **options)
    return shaken(conditioner).eval()


def values(count=6, length=LENGTH):
    return torch.randint(CLASSES, (count, length))


def hidden(y, levels, level):
    """Values that are anything at this level and above."""
    return torch.where(levels < level, y, torch.randint(CLASSES, y.shape))


class TestLevels:
    @pytest.mark.parametrize(("name", "ordering"), CASES)
    def test_one_pass_gives_what_hidden_values_give(self, name, ordering):
        conditioner, y, levels = make(name, ordering), values(), ordering.levels(LENGTH)
        logits = conditioner(y)
        assert conditioner.one_pass
        for level in range(conditioner.num_levels):
            here = levels == level
            masked = hidden(y, levels, level)
            torch.testing.assert_close(conditioner(masked)[:, here], logits[:, here])
            torch.testing.assert_close(conditioner.level_logits(masked, level), logits[:, here])

    @pytest.mark.parametrize("name", ["transformer", "masked"])
    @pytest.mark.parametrize("first_level", [0, 1, 2, 3])
    def test_logits_below_the_first_level_are_zeros(self, name, first_level):
        ordering = Strided(columns=3)
        conditioner, y, levels = make(name, ordering), values(), ordering.levels(LENGTH)
        whole, part = conditioner(y), conditioner(y, first_level=first_level)
        assert (part[:, levels < first_level] == 0).all()
        torch.testing.assert_close(part[:, levels >= first_level], whole[:, levels >= first_level])
        assert (whole != 0).any(-1).all()

    @pytest.mark.parametrize(("name", "ordering"), CASES)
    def test_cached_steps_give_the_logits_of_one_pass(self, name, ordering):
        conditioner, y = make(name, ordering), values()
        stepped, evaluated = [], 0

        def count(*_):
            nonlocal evaluated
            evaluated += 1

        conditioner.backbone.register_forward_hook(count)

        def decide(dimensions, logits):
            stepped.append((dimensions, logits))
            return y[:, dimensions]

        with torch.no_grad():
            blank = torch.zeros_like(y)
            assert torch.equal(decide_levels(conditioner, blank, decide), y)
        assert conditioner.steps == (name in ("transformer", "convolution", "lstm"))
        if name in ("transformer", "convolution", "lstm"):
            assert evaluated == 0  # the cached steps, not the whole network
        logits = conditioner(y)
        for dimensions, step in stepped:
            torch.testing.assert_close(step, logits[:, dimensions])

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("name", ["transformer", "table", "masked"])
    def test_logits_depend_on_lower_levels_only(self, name, ordering):
        conditioner = make(name, ordering)
        levels, y = ordering.levels(LENGTH), values()
        logits = conditioner(y)
        seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for source in range(LENGTH):
            changed = y.clone()
            changed[:, source] = (changed[:, source] + 1) % CLASSES
            seen[source] = (conditioner(changed) - logits).abs().amax((0, 2)) > 1e-6
        allowed = levels.unsqueeze(-1) < levels
        assert not (seen & ~allowed).any()
        if name == "table":
            assert torch.equal(seen, allowed)
        assert (logits[:, levels == 0].std(0) < 1e-6).all()

    @pytest.mark.parametrize("name", ["transformer", "made", "masked"])
    def test_logits_of_one_level_and_of_sampled_levels_are_those_of_all(self, name):
        conditioner, y = make(name, Strided(columns=3)), values()
        logits = conditioner(y)
        layout = conditioner.layout(LENGTH, y.device)
        for level in (0, 1, 2):
            part = conditioner.level_logits(y, level)
            torch.testing.assert_close(part, logits[:, layout.members[level]])
        level = torch.tensor([1, 2, 0, 1, 2, 1])
        sampled, part = conditioner.sampled_level_logits(y, level)
        assert torch.equal(sampled, layout.levels == level.unsqueeze(-1))
        torch.testing.assert_close(part, logits[sampled])

    @pytest.mark.parametrize("name", ["transformer", "table", "masked"])
    def test_values_of_the_level_itself_and_above_do_not_matter_to_it(self, name):
        conditioner, y = make(name, Natural()), values()
        for level in range(LENGTH):
            other = y.clone()
            other[:, level:] = values()[:, level:]
            torch.testing.assert_close(
                conditioner.level_logits(other, level), conditioner.level_logits(y, level)
            )

    def test_which_prefixes_depend_on_nothing_behind_them(self):
        kept = {
            key: [number for number in range(1, 5) if make("table", o).supports_prefix(number, 5)]
            for key, o in ORDERINGS.items()
        }
        assert kept["natural"] == kept["blocks"] == kept["halves"] == [1, 2, 3, 4]
        assert kept["reversed"] == kept["permutation"] == kept["right-half-first"] == []
        assert kept["odd-first"] == [4]
        assert kept["parity"] == kept["strided"] == kept["coarse-to-fine"] == [1]


class TestValues:
    @pytest.mark.parametrize("name", ["transformer", "table", "masked"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_indices_and_one_hot_vectors_give_equal_logits(self, name, dtype):
        conditioner, y = make(name, Strided(columns=3)).to(dtype), values()
        one_hot = to_one_hot(y, CLASSES, dtype).requires_grad_()
        logits = conditioner(one_hot)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits, conditioner(y))
        logits.square().sum().backward()
        conditioning = (Strided(columns=3).levels(LENGTH) < 2).nonzero().squeeze(-1)
        assert (one_hot.grad[:, conditioning] != 0).any(-1).all()

    @pytest.mark.parametrize("name", ["transformer", "convolution", "made", "lstm", "masked"])
    @pytest.mark.parametrize("length", range(1, LENGTH + 1))
    def test_fewer_dimensions_are_an_event_of_their_own(self, name, length):
        conditioner = make(name, Natural())
        logits = conditioner(values(length=length))
        assert logits.shape == (6, length, 4)
        assert logits.isfinite().all()
        assert ((logits.amax(0) - logits.amin(0))[1:] > 1e-6).any(-1).all()

    def test_in_natural_order_a_shorter_event_is_the_beginning_of_a_longer(self):
        conditioner, y = make("transformer"), values()
        torch.testing.assert_close(conditioner(y[:, :3]), conditioner(y)[:, :3])

    @pytest.mark.parametrize("name", ["transformer", "lstm", "masked"])
    def test_logits_keep_full_precision_under_autocast(self, name):
        conditioner, y = make(name), values()
        with torch.autocast("cpu", torch.bfloat16):
            logits = conditioner(y)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, conditioner(y), rtol=0.1, atol=0.3)
        one_hot = to_one_hot(y, CLASSES)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(conditioner(one_hot), logits, rtol=0.1, atol=0.3)


class TestContext:
    @pytest.mark.parametrize("shape", [(6, 4), (6, 2, 4)])
    @pytest.mark.parametrize("name", ["transformer", "convolution", "made", "lstm", "masked"])
    def test_every_dimension_sees_it(self, name, shape):
        backbone = DilatedConvolution(WIDTH, layers=3) if name == "masked" else name
        if name == "convolution":
            backbone = LevelConvolution(WIDTH, layers=2, distances=(1, 2, 4, 6))
        conditioner = make(backbone, Natural(), context=Context(4))
        y, context = values(), torch.randn(shape)
        logits = conditioner(y, context)
        other = conditioner(y, context + torch.randn(shape))
        assert ((logits - other).abs().amax((0, 2)) > 1e-6).tolist() == [True] * 5
        alone = conditioner(y[2:3], context[2:3])
        torch.testing.assert_close(alone, logits[2:3])

    @pytest.mark.parametrize("shape", [(6, 4), (6, 2, 4)])
    @pytest.mark.parametrize("name", ["transformer", "made", "lstm", "masked"])
    def test_steps_agree_with_one_pass(self, name, shape):
        conditioner = make(name, Natural(), context=Context(4))
        y, context = values(), torch.randn(shape)
        logits, stepped = conditioner(y, context), []

        def decide(dimensions, part):
            stepped.append(part)
            return y[:, dimensions]

        with torch.no_grad():
            decide_levels(conditioner, torch.zeros_like(y), decide, context)
        torch.testing.assert_close(torch.cat(stepped, 1), logits)

    def test_it_is_given_if_and_only_if_the_flow_takes_one(self):
        y, context = values(), torch.randn(6, 4)
        with pytest.raises(UserError, match="no context was given"):
            make("transformer", context=Context(4))(y)
        with pytest.raises(UserError, match="takes none: give the conditioner a Context"):
            make("transformer")(y, context)
        with pytest.raises(UserError, match="none for a context"):
            make("table", context=Context(4))


ALIGNED = {
    **{name: CAUSAL[name] for name in ("transformer", "convolution", "made", "lstm")},
    "learned-positions": lambda _: Transformer(
        WIDTH, heads=2, positions="learned", length=LENGTH, locality="distance"
    ),
    "masked": lambda _: DilatedConvolution(WIDTH, layers=3),
    "both-ways": lambda _: LSTM(WIDTH, bidirectional=True),
}
aligned = pytest.mark.parametrize("name", ALIGNED)


def make_aligned(name, ordering=NATURAL, **options):
    torch.manual_seed(0)
    backbone = ALIGNED[name](ordering)
    return make(backbone, ordering, context=Context(4, aligned=True), **options)


class TestAlignedContext:
    @aligned
    def test_a_position_is_seen_by_its_own_dimension(self, name):
        conditioner, y = make_aligned(name), values()
        context = torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context)
        for d in range(LENGTH):
            other = context.clone()
            other[:, d] += 1
            changed = (conditioner(y, other) - logits).abs().amax((0, 2)) > 1e-6
            assert changed[d]
            if name == "lstm":
                assert not changed[:d].any()
        torch.testing.assert_close(conditioner(y[2:3], context[2:3]), logits[2:3])

    @aligned
    @pytest.mark.parametrize("ordering", [Natural(), Reversed(), BehindContext(Reversed())])
    def test_steps_agree_with_one_pass(self, name, ordering):
        first_level = int(isinstance(ordering, BehindContext))
        conditioner = make_aligned(name, ordering)
        y, context = values(), torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context, first_level=first_level)
        stepped = torch.zeros_like(logits)

        def decide(dimensions, part):
            stepped[:, dimensions] = part
            return y[:, dimensions]

        with torch.no_grad():
            blank = torch.zeros_like(y)
            options = {"first_level": first_level}
            assert torch.equal(decide_levels(conditioner, blank, decide, context, **options), y)
        torch.testing.assert_close(stepped, logits)

    @aligned
    @pytest.mark.parametrize("ordering", [Natural(), BehindContext(Reversed())])
    def test_it_is_no_leak(self, name, ordering):
        conditioner, y = make_aligned(name, ordering), values()
        context, levels = torch.randn(6, LENGTH, 4), ordering.levels(LENGTH)
        logits = conditioner(y, context)
        for level in range(int(levels.min()), int(levels.max()) + 1):
            other = conditioner(hidden(y, levels, level), context)
            here = levels <= level
            torch.testing.assert_close(other[:, here], logits[:, here])

    @aligned
    def test_sampled_levels_and_one_hot_vectors_see_it_too(self, name):
        conditioner, y = make_aligned(name), values()
        context = torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context)
        level = torch.tensor([1, 2, 3, 4, 1, 2])
        sampled, part = conditioner.sampled_level_logits(y, level, context)
        torch.testing.assert_close(part, logits[sampled])
        torch.testing.assert_close(conditioner(to_one_hot(y, CLASSES), context), logits)

    @aligned
    def test_fewer_dimensions_take_the_first_positions(self, name):
        conditioner, context = make_aligned(name), torch.randn(6, LENGTH, 4)
        y = values(length=3)
        torch.testing.assert_close(conditioner(y, context), conditioner(y, context[:, :3]))

    def test_behind_a_context_all_dimensions_at_once(self):
        conditioner = make_aligned("both-ways", BehindContext(Blocks(LENGTH)))
        y, context = values(), torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context)
        assert conditioner.num_levels == 2  # the context's is empty
        assert (logits != 0).any(-1).all()
        torch.testing.assert_close(conditioner(values(), context), logits)
        tokens = make("transformer", BehindContext(Blocks(LENGTH)), context=Context(4))
        logits = tokens(y, context)
        assert not torch.allclose(tokens(y, context + 1), logits)
        torch.testing.assert_close(tokens(values(), context), logits)

    def test_errors(self):
        conditioner, y = make_aligned("transformer"), values()
        for shape in ((6, 4), (6, LENGTH - 1, 4), (6, LENGTH + 1, 4)):
            with pytest.raises(UserError, match="with 5 dimensions: give a vector for each"):
                conditioner(y, torch.randn(shape))
        with pytest.raises(UserError, match="no context was given"):
            conditioner(y)


class Reshaping(nn.Module):
    """A user's network that returns another shape than it is given."""

    def forward(self, features):
        return features[..., :-1]


class TestConstruction:
    def test_a_network_of_the_users_needs_a_width_and_gets_positions(self):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        conditioner = make(Masked(encoder, WIDTH), Strided(columns=3))
        assert conditioner.embedding.positions.shape == (LENGTH, WIDTH)
        assert not conditioner.one_pass
        assert conditioner(values()).shape == (6, LENGTH, 4)
        assert make("transformer").embedding.positions is None
        with pytest.raises(UserError, match="width of a TransformerEncoder is not known"):
            make(encoder)
        encoder.width = WIDTH
        assert isinstance(make(encoder).backbone, Masked)

    def test_another_shape_is_refused(self):
        network = Reshaping()
        network.width = WIDTH
        with pytest.raises(UserError, match=r"returned \(6, 5, 7\).*\(6, 5, 8\)"):
            make(network)(values())

        class Short(Backbone):
            def forward(self, content, query=None, levels=None):
                return content[:, 1:]

        backbone = Short(WIDTH, level_causal=True)
        with pytest.raises(UserError, match=r"returned features \(6, 4, 8\).*\(6, 5, 8\)"):
            make(backbone)(values())

    def test_it_may_have_a_single_level(self):
        conditioner = make("transformer", Strided(columns=1))
        assert conditioner.num_levels == 1
        assert conditioner(values()).std(0).max() < 1e-6  # nothing is seen

    @pytest.mark.parametrize(
        ("ordering", "levels"), [(Natural(), 5), (Reversed(), 5), (Parity(), 2), (Blocks(2), 3)]
    )
    def test_levels_are_those_of_the_ordering(self, ordering, levels):
        assert make("transformer", ordering).num_levels == levels

    @pytest.mark.parametrize("name", ["transformer", "masked"])
    def test_the_head_gives_its_first_logits_whatever_the_values(self, name):
        conditioner, logits = make(name), torch.randn(4)
        conditioner.init_head(logits)
        torch.testing.assert_close(conditioner(values()), logits.expand(6, LENGTH, 4))

    def test_logits_are_as_many_as_classes_by_default(self):
        assert make("transformer", num_logits=None).num_logits == CLASSES

    def test_it_shows_how_it_runs(self):
        shown = repr(make("transformer", Strided(columns=3)))
        assert "ordering=Strided(columns=3), length=5, level-causal" in shown
        assert "length=5, masked" in repr(make("masked"))

    @pytest.mark.parametrize("name", ["transformer", "convolution", "lstm", "table", "masked"])
    def test_training_works_after_a_validation_in_inference_mode(self, name):
        # Lightning validates in inference mode, and before the first step.
        conditioner, y = make(name, Reversed()), values()
        with torch.inference_mode():
            conditioner(y)
        conditioner(y).sum().backward()

    def test_what_a_backbone_is_handed(self):
        handed = []

        class Spy(Backbone):
            def __init__(self):
                super().__init__(WIDTH, level_causal=True)

            def forward(self, content, query=None, levels=None):
                handed.append((content, query, levels))
                return content * 0 + query

        conditioner = make(Spy(), Parity(), context=Context(4))
        y, context = values(), torch.randn(6, 2, 4)
        conditioner(y, context)
        content, query, levels = handed[-1]
        assert levels.tolist() == [-1, -1, 0, 1, 0, 1, 0]
        assert (query[:2] == 0).all()
        assert torch.equal(content[:, 2:], conditioner.embedding.values[y])


class TestResume:
    def test_windows_that_go_on_are_one_sequence(self):
        conditioner, y = make(LSTM(WIDTH, layers=2)), values(3)
        assert conditioner.stateful
        whole = conditioner(y)
        last, state = torch.full((3,), -1), None
        for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
            logits, state = conditioner.resume(y[:, part], last, state)
            torch.testing.assert_close(logits, whole[:, part])
            last = y[:, part.stop - 1]

    def test_some_may_begin_anew(self):
        conditioner, y = make(LSTM(WIDTH, layers=2)), values(3)
        _, state = conditioner.resume(y, torch.full((3,), -1))
        logits, _ = conditioner.resume(y, torch.tensor([0, -1, 2]), state)
        same = [torch.allclose(one, two) for one, two in zip(logits, conditioner(y), strict=True)]
        assert same == [False, True, False]

    @pytest.mark.parametrize(
        ("backbone", "ordering", "options"),
        [
            ("transformer", NATURAL, {}),
            ("lstm", Reversed(), {}),
            ("masked", NATURAL, {}),
            ("lstm", NATURAL, {"context": Context(2)}),
            ("lstm", NATURAL, {"num_logits": CLASSES, "expert": NGramExpert(CLASSES, 2)}),
        ],
    )
    def test_others_are_refused(self, backbone, ordering, options):
        conditioner = make(backbone, ordering, **options)
        assert not conditioner.stateful
        with pytest.raises(UserError, match="choose an LSTM over Natural"):
            conditioner.resume(values(), torch.zeros(6, dtype=torch.long))

    def test_the_order_is_from_left_to_right_without_a_context(self):
        assert make("transformer").left_to_right
        assert not make("transformer", Reversed()).left_to_right
        assert not make("transformer", context=Context(2)).left_to_right


@pytest.mark.parametrize(("backbone", "number"), [("transformer", 2), ("lstm", 1), ("made", 1)])
def test_features_of_every_layer(backbone, number):
    conditioner, y = make(backbone), values()
    logits, features = conditioner.layer_logits(y)
    assert len(features) == number
    torch.testing.assert_close(logits, conditioner(y))
    torch.testing.assert_close(conditioner.head(features[-1]), logits)


@pytest.mark.parametrize("backbone", ["masked", "table"])
def test_features_of_every_layer_need_one_pass(backbone):
    with pytest.raises(UserError, match="choose a level-causal backbone"):
        make(backbone).layer_logits(values())


class TestExpert:
    def on_ngrams(self, name, ordering=NATURAL, order=3):
        """A random conditioner on n-grams, which count for more or less."""
        expert = NGramExpert(CLASSES, order)
        expert.ngrams.count([markov(200, CLASSES)])
        return make(name, ordering, CLASSES, expert=expert)

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("name", ["transformer", "convolution", "table", "masked"])
    def test_logits_depend_on_lower_levels_only(self, name, ordering):
        conditioner, levels = self.on_ngrams(name, ordering), ordering.levels(LENGTH)
        y = states(CLASSES, LENGTH)[::3]
        logits = conditioner(y)
        for source in range(LENGTH):
            changed = y.clone()
            changed[:, source] = (changed[:, source] + 1) % CLASSES
            seen = (conditioner(changed) - logits).abs().amax((0, 2)) > 1e-6
            assert not (seen & (levels <= levels[source])).any()
            # The right neighbour knows of it by the n-grams, whatever the network makes of it.
            if source + 1 < LENGTH and levels[source] < levels[source + 1]:
                assert seen[source + 1]

    @pytest.mark.parametrize("name", ["transformer", "convolution", "lstm", "masked"])
    @pytest.mark.parametrize("ordering", [NATURAL, Strided(columns=3)], ids=repr)
    def test_logits_of_levels_are_those_of_all(self, name, ordering):
        if name == "lstm" and ordering is not NATURAL:
            pytest.skip("an LSTM reads in one direction")
        conditioner, y = self.on_ngrams(name, ordering), values()
        logits = conditioner(y)
        layout = conditioner.layout(LENGTH, y.device)
        for level, dimensions in enumerate(layout.members):
            part = conditioner.level_logits(y, level)
            torch.testing.assert_close(part, logits[:, dimensions], rtol=1e-4, atol=1e-4)
        sampled, part = conditioner.sampled_level_logits(y, torch.tensor([1, 2, 0, 1, 2, 1]))
        torch.testing.assert_close(part, logits[sampled])
        one_hot = to_one_hot(y, CLASSES, torch.float32)
        torch.testing.assert_close(conditioner(one_hot), logits)

        def decide(dimensions, part):
            torch.testing.assert_close(part, logits[:, dimensions], rtol=1e-4, atol=1e-4)
            return y[:, dimensions]

        with torch.no_grad():
            assert torch.equal(decide_levels(conditioner, torch.zeros_like(y), decide), y)

    @pytest.mark.parametrize("leave_out", [False, True])
    def test_at_first_the_n_grams_alone_count(self, leave_out):
        torch.manual_seed(0)
        expert, text = NGramExpert(CLASSES, 3), markov(200, CLASSES)
        expert.ngrams.count([text])
        backbone = Transformer(WIDTH, layers=1, heads=2)
        conditioner = Conditioner(CLASSES, LENGTH, NATURAL, backbone, expert=expert)
        conditioner.init_head(torch.zeros(CLASSES))
        y = text[:LENGTH].unsqueeze(0)
        own = y[0] if leave_out else None
        ngrams = expert.ngrams
        expected = ngrams.next_probs(ngrams.pack(y)[0], torch.arange(LENGTH), own).log()
        with leave_one_out(counted=leave_out):
            torch.testing.assert_close(conditioner(y)[0], expected.float())

    def test_another_number_of_classes_is_refused(self):
        for classes, outputs in ((4, CLASSES), (CLASSES, 4)):
            with pytest.raises(UserError, match="logits of the classes themselves"):
                make("transformer", num_logits=outputs, expert=NGramExpert(classes, 2))

    def test_a_transform_of_ranks_may_have_one(self):
        conditioner, y = self.on_ngrams("transformer"), values()
        transform = ConditionalTransform(RankPermutation(CLASSES), conditioner)
        with torch.no_grad():
            assert torch.equal(transform(transform.inv(y)), y)


class TestPrecision:
    @pytest.mark.parametrize("name", ["transformer", "convolution", "lstm", "masked"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_logits_of_a_half_precision_module_are_of_full_precision(self, name, dtype):
        conditioner, y = make(name).to(dtype), values()
        logits = conditioner(y)
        assert logits.dtype == torch.float32
        features = (
            conditioner.features(y, torch.tensor([1]))
            if name == "masked"
            else (conditioner.features(y))
        )
        assert features.dtype == dtype
        head = conditioner.head
        at = conditioner.layout(LENGTH, y.device).members[1]
        expected = features.float() @ head.weight.float().T + head.bias.float()
        torch.testing.assert_close(logits[:, at], expected[:, at])

    def test_so_are_those_of_an_expert(self):
        conditioner = TestExpert().on_ngrams("transformer").bfloat16()
        assert conditioner(values()).dtype == torch.float32


class TestShortcut:
    def test_it_is_asked_first_without_a_context(self):
        conditioner, y, asked = make("transformer"), values(), []

        def shortcut(who, y, first_level):
            asked.append((who, first_level))
            return torch.ones(1) if first_level else None

        with evaluated_by(shortcut):
            assert conditioner(y, first_level=1) == 1
            assert conditioner(y).shape == (6, LENGTH, 4)
        assert conditioner(y, first_level=1).shape == (6, LENGTH, 4)
        assert asked == [(conditioner, 1), (conditioner, 0)]
        other = make("transformer", context=Context(2))
        with evaluated_by(shortcut):
            other(y, torch.randn(6, 2), first_level=1)
        assert len(asked) == 2


class TestResized:
    def test_all_parameters_are_shared(self):
        conditioner = make(LSTM(WIDTH, ahead=2), Strided(columns=2))
        other = conditioner.resized(num_levels=3)
        assert (conditioner.num_levels, other.num_levels) == (2, 3)
        assert other.ordering == Strided(columns=3)
        assert [*map(id, other.parameters())] == [*map(id, conditioner.parameters())]
        fresh = make(LSTM(WIDTH, ahead=2), Strided(columns=3))
        fresh.load_state_dict(conditioner.state_dict())
        y = values(3)
        torch.testing.assert_close(other(y), fresh(y))
        assert not torch.allclose(other(y), conditioner(y))

    def test_events_may_be_longer(self):
        conditioner = make(LSTM(WIDTH, ahead=2), Strided(columns=2))
        longer = conditioner.resized(LENGTH + 3)
        assert (longer.length, longer.num_levels) == (LENGTH + 3, 2)
        y = torch.randint(3, (2, LENGTH + 3))
        torch.testing.assert_close(longer(y)[:, :2], conditioner(y[:, :LENGTH])[:, :2])
        assert longer.resized(LENGTH, 3).ordering == Strided(columns=3)

    @pytest.mark.parametrize(
        ("backbone", "ordering", "count", "message"),
        [
            (LevelConvolution(WIDTH), Strided(2), 3, "an embedding for each of 2 levels, and 3"),
            (LSTM(WIDTH), Natural(), 2, "Natural.. cannot have another number of levels: train"),
            (LSTM(WIDTH), Strided(2), 0, "columns is 0: give at least 1"),
            (LSTM(WIDTH), Strided(2), LENGTH + 1, f"give 1 to {LENGTH}, the dimensions"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused(self, backbone, ordering, count, message):
        with pytest.raises(UserError, match=message):
            make(backbone, ordering).resized(num_levels=count)

    def test_positions_that_are_embedded_fix_the_length(self):
        conditioner = make(Masked(nn.Linear(WIDTH, WIDTH), WIDTH), Strided(2))
        message = f"an embedding for each of {LENGTH} dimensions, and {LENGTH + 1} were asked for"
        with pytest.raises(UserError, match=message):
            conditioner.resized(LENGTH + 1)
