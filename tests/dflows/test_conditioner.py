import pytest
import torch
from torch import nn

from dflows.backbones import (
    LSTM,
    MADE,
    Backbone,
    DilatedConvolution,
    LevelConvolution,
    Table,
    Transformer,
)
from dflows.checks import check_causal
from dflows.conditioner import Conditioner
from dflows.errors import UserError
from dflows.ngrams import NGrams
from dflows.orderings import BehindContext, Blocks, Natural, Parity, Reversed, Strided
from dflows.representations import to_one_hot
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


def make(backbone, ordering=NATURAL, execution="auto", **options):
    """A random conditioner; equal calls give equal ones but for the execution."""
    torch.manual_seed(0)
    if isinstance(backbone, str):
        backbone = CAUSAL[backbone](ordering)
    conditioner = Conditioner(
        CLASSES, LENGTH, 4, ordering, backbone, execution=execution, **options
    )
    return shaken(conditioner).eval()


def values(count=6, length=LENGTH):
    return torch.randint(CLASSES, (count, length))


def needing(conditioner, length=LENGTH):
    """The dimensions that need the network."""
    return (conditioner.ordering.levels(length) >= conditioner.first_level).nonzero().squeeze(-1)


class TestExecutions:
    @pytest.mark.parametrize(("name", "ordering"), CASES)
    @pytest.mark.parametrize("first", [False, True])
    def test_level_causal_and_masked_give_equal_logits(self, name, ordering, first):
        causal, masked = (
            make(name, ordering, execution, conditions_first=first)
            for execution in ("causal", "masked")
        )
        masked.load_state_dict(causal.state_dict())
        y = values()
        torch.testing.assert_close(masked(y), causal(y))
        assert (causal.one_pass, masked.one_pass) == (True, False)

    @pytest.mark.parametrize(("name", "ordering"), CASES)
    def test_cached_steps_give_the_logits_of_one_pass(self, name, ordering):
        conditioner, y = make(name, ordering, conditions_first=True), values()
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
            assert torch.equal(conditioner.by_levels(blank, decide), y)
        if name in ("transformer", "convolution", "lstm"):
            assert evaluated == 0  # the cached steps, not the whole network
        logits = conditioner(y)
        for dimensions, step in stepped:
            torch.testing.assert_close(step, logits[:, dimensions])

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("name", ["transformer", "table", "masked"])
    def test_logits_depend_on_lower_levels_only(self, name, ordering):
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner = make(backbone, ordering)
        levels, y = ordering.levels(LENGTH), values()
        logits = conditioner(y)
        seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for source in range(LENGTH):
            changed = y.clone()
            changed[:, source] = (changed[:, source] + 1) % CLASSES
            seen[source] = (conditioner(changed) - logits).abs().amax((0, 2)) > 1e-6
        allowed = (levels.unsqueeze(-1) < levels) & (levels > 0)
        assert not (seen & ~allowed).any()
        if name == "table":
            assert torch.equal(seen, allowed)
        assert (logits[:, levels == 0] == 0).all()

    @pytest.mark.parametrize("name", ["transformer", "made", "masked"])
    def test_logits_of_one_level_and_of_drawn_levels_are_those_of_all(self, name):
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone, Strided(columns=3)), values()
        logits = conditioner(y)
        levels, members = conditioner.levels(LENGTH, y.device)
        for level in (1, 2):
            part = conditioner.level_logits(y, level)
            torch.testing.assert_close(part, logits[:, members[level]])
        level = torch.tensor([1, 2, 2, 1, 2, 1])
        drawn, part = conditioner.drawn_logits(y, level)
        assert torch.equal(drawn, levels == level.unsqueeze(-1))
        torch.testing.assert_close(part, logits[drawn])

    @pytest.mark.parametrize("name", ["transformer", "table", "masked"])
    def test_values_of_the_level_itself_and_above_do_not_matter_to_it(self, name):
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone, Natural()), values()
        for level in range(1, LENGTH):
            other = y.clone()
            other[:, level:] = values()[:, level:]
            torch.testing.assert_close(
                conditioner.level_logits(other, level), conditioner.level_logits(y, level)
            )

    @pytest.mark.parametrize("name", ["transformer", "masked"])
    @pytest.mark.parametrize("ordering", [Natural(), Strided(columns=3)], ids=str)
    def test_the_fixed_point_is_what_the_levels_give(self, name, ordering):
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone, ordering, conditions_first=True), values()

        def decide(dimensions, logits):
            return logits[..., :CLASSES].argmax(-1)

        with torch.no_grad():
            decided = conditioner.by_levels(y, decide)
            found, iterations = conditioner.fixed_point(y, decide)
        assert torch.equal(found, decided)
        assert 1 <= iterations <= conditioner.passes + 1
        again, iterations = conditioner.fixed_point(found, decide)
        assert torch.equal(again, found)
        assert iterations == 1

    @pytest.mark.parametrize("name", [*CAUSAL, "masked"])
    @pytest.mark.parametrize("ordering", [Natural(), Blocks(size=2), Blocks(LENGTH)], ids=str)
    @pytest.mark.parametrize("execution", ["auto", "masked"])
    def test_a_known_beginning_is_kept_and_conditioned_on(self, name, ordering, execution):
        if name == "lstm" and not isinstance(ordering, Natural):
            pytest.skip("refused by the LSTM")
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner = make(backbone, ordering, execution, conditions_first=True)
        noise = torch.rand(6, LENGTH, CLASSES)

        def decide(dimensions, logits):
            return (logits[..., :CLASSES] + noise[:, dimensions]).argmax(-1)

        with torch.no_grad():
            whole = conditioner.by_levels(torch.zeros_like(values()), decide)
            for known in range(LENGTH + 1):
                assert conditioner.keeps_beginning(known or LENGTH, LENGTH)
                rest = torch.cat([whole[:, :known], values()[:, known:]], dim=1)
                assert torch.equal(conditioner.by_levels(rest, decide, known=known), whole)
                found, iterations = conditioner.fixed_point(rest, decide, known=known)
                assert torch.equal(found, whole)
                assert (iterations == 0) == (known == LENGTH)

    def test_which_beginnings_depend_on_nothing_behind_them(self):
        kept = {
            key: [number for number in range(1, 5) if make("table", o).keeps_beginning(number, 5)]
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
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone, Strided(columns=3)).to(dtype), values()
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
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner = make(backbone, Natural())
        logits = conditioner(values(length=length))
        assert logits.shape == (6, length, 4)
        assert logits.isfinite().all()
        assert torch.equal(needing(conditioner, length), torch.arange(1, length))

    def test_in_natural_order_a_shorter_event_is_the_beginning_of_a_longer(self):
        conditioner, y = make("transformer"), values()
        torch.testing.assert_close(conditioner(y[:, :3]), conditioner(y)[:, :3])

    @pytest.mark.parametrize("name", ["transformer", "lstm", "masked"])
    def test_logits_keep_full_precision_under_autocast(self, name):
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone), values()
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
        conditioner = make(backbone, Natural(), context_features=4)
        y, context = values(), torch.randn(shape)
        logits = conditioner(y, context)
        other = conditioner(y, context + torch.randn(shape))
        assert ((logits - other).abs().amax((0, 2)) > 1e-6).tolist() == [False, *[True] * 4]
        alone = conditioner(y[2:3], context[2:3])
        torch.testing.assert_close(alone, logits[2:3])

    @pytest.mark.parametrize("shape", [(6, 4), (6, 2, 4)])
    @pytest.mark.parametrize("name", ["transformer", "made", "lstm"])
    def test_executions_and_steps_agree_with_a_context(self, name, shape):
        causal, masked = (
            make(name, Natural(), execution, context_features=4, conditions_first=True)
            for execution in ("causal", "masked")
        )
        y, context = values(), torch.randn(shape)
        logits = causal(y, context)
        torch.testing.assert_close(masked(y, context), logits)
        stepped = []

        def decide(dimensions, part):
            stepped.append(part)
            return y[:, dimensions]

        with torch.no_grad():
            causal.by_levels(torch.zeros_like(y), decide, context)
        torch.testing.assert_close(torch.cat(stepped, 1), logits)

    def test_it_is_given_if_and_only_if_the_flow_takes_one(self):
        y, context = values(), torch.randn(6, 4)
        with pytest.raises(UserError, match="no context was given"):
            make("transformer", context_features=4)(y)
        with pytest.raises(UserError, match="takes none: set `context_features`"):
            make("transformer")(y, context)
        with pytest.raises(UserError, match="none for a context"):
            make("table", context_features=4)


ALIGNED = {
    **{name: CAUSAL[name] for name in ("transformer", "convolution", "made", "lstm")},
    "learned-positions": lambda _: Transformer(
        WIDTH, heads=2, positions="learned", length=LENGTH, locality="distance"
    ),
    "masked": lambda _: DilatedConvolution(WIDTH, layers=3),
    "both-ways": lambda _: LSTM(WIDTH, bidirectional=True),
}
aligned = pytest.mark.parametrize("name", ALIGNED)


def make_aligned(name, ordering=NATURAL, execution="auto", **options):
    torch.manual_seed(0)
    backbone = ALIGNED[name](ordering)
    return make(backbone, ordering, execution, context_features=4, align_context=True, **options)


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
            assert changed[d] == (d > 0)  # dimension 0 needs no network
            if name == "lstm":
                assert not changed[:d].any()
        torch.testing.assert_close(conditioner(y[2:3], context[2:3]), logits[2:3])

    @aligned
    @pytest.mark.parametrize("ordering", [Natural(), Reversed(), BehindContext(Reversed())])
    def test_executions_steps_and_the_fixed_point_agree(self, name, ordering):
        first = not isinstance(ordering, BehindContext)
        conditioner = make_aligned(name, ordering, conditions_first=first)
        y, context = values(), torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context)
        if conditioner.one_pass:
            masked = make_aligned(name, ordering, "masked", conditions_first=first)
            torch.testing.assert_close(masked(y, context), logits)
        stepped = torch.zeros_like(logits)

        def decide(dimensions, part):
            stepped[:, dimensions] = part
            return y[:, dimensions]

        def choose(dimensions, part):
            return part[..., :CLASSES].argmax(-1)

        with torch.no_grad():
            assert torch.equal(conditioner.by_levels(torch.zeros_like(y), decide, context), y)
            decided = conditioner.by_levels(y, choose, context)
            found, _ = conditioner.fixed_point(y, choose, context)
        torch.testing.assert_close(stepped, logits)
        assert torch.equal(found, decided)
        assert conditioner.passes == LENGTH

    @aligned
    @pytest.mark.parametrize("ordering", [Natural(), BehindContext(Reversed())])
    def test_it_is_no_leak(self, name, ordering):
        conditioner = make_aligned(name, ordering)
        check_causal(conditioner, torch.randn(1, LENGTH, 4))

    @aligned
    def test_drawn_levels_and_one_hot_vectors_see_it_too(self, name):
        conditioner, y = make_aligned(name), values()
        context = torch.randn(6, LENGTH, 4)
        logits = conditioner(y, context)
        level = torch.tensor([1, 2, 3, 4, 1, 2])
        drawn, part = conditioner.drawn_logits(y, level, context)
        torch.testing.assert_close(part, logits[drawn])
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
        assert conditioner.passes == 1
        assert (logits != 0).any(-1).all()
        torch.testing.assert_close(conditioner(values(), context), logits)
        tokens = make("transformer", BehindContext(Blocks(LENGTH)), context_features=4)
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
        with pytest.raises(UserError, match="there is no context: give `context_features`"):
            make("transformer", align_context=True)
        with pytest.raises(UserError, match="no dimension of level 0, and a base begins there"):
            make("transformer", BehindContext(Natural()), conditions_first=True)


class Reshaping(nn.Module):
    """A user's network that returns another shape than it is given."""

    def forward(self, features):
        return features[..., :-1]


class TestConstruction:
    def test_a_network_of_the_users_needs_a_width_and_gets_positions(self):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        conditioner = make(encoder, Strided(columns=3), width=WIDTH)
        assert conditioner.positions.shape == (LENGTH, WIDTH)
        assert not conditioner.one_pass
        assert conditioner(values()).shape == (6, LENGTH, 4)
        assert make(encoder, width=WIDTH, positions=False).positions is None
        assert make("transformer").positions is None
        assert make("transformer", positions=True).positions is not None
        with pytest.raises(UserError, match="width of a TransformerEncoder is not known"):
            make(encoder)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UserError, match="width is 9 and the backbone's own is 8"):
            make("transformer", width=9)
        with pytest.raises(UserError, match=r"not level-causal.*'masked'"):
            make(DilatedConvolution(WIDTH), execution="causal")
        with pytest.raises(UserError, match="same level"):
            make("transformer", Strided(columns=1))
        with pytest.raises(UserError, match=r"returned features \(6, 5, 7\).*\(6, 5, 8\)"):
            make(Reshaping(), width=WIDTH)(values())

    def test_a_base_may_have_a_single_level(self):
        conditioner = make("transformer", Strided(columns=1), conditions_first=True)
        assert conditioner.passes == 1
        assert conditioner(values()).std(0).max() < 1e-6  # nothing is seen

    @pytest.mark.parametrize(
        ("ordering", "passes"), [(Natural(), 4), (Reversed(), 4), (Parity(), 1), (Blocks(2), 2)]
    )
    def test_passes_are_the_levels_that_need_the_network(self, ordering, passes):
        assert make("transformer", ordering).passes == passes
        assert make("transformer", ordering, conditions_first=True).passes == passes + 1

    def test_it_shows_how_it_runs(self):
        shown = repr(make("transformer", Strided(columns=3)))
        assert "ordering=Strided(columns=3), execution='causal', length=5" in shown

    @pytest.mark.parametrize("name", ["transformer", "convolution", "lstm", "table", "masked"])
    def test_training_works_after_a_validation_in_inference_mode(self, name):
        # Lightning validates in inference mode, and before the first step.
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else name
        conditioner, y = make(backbone, Reversed()), values()
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

        conditioner = make(Spy(), Parity(), context_features=4)
        y, context = values(), torch.randn(6, 2, 4)
        conditioner(y, context)
        content, query, levels = handed[-1]
        assert levels.tolist() == [-1, -1, 0, 1, 0, 1, 0]
        assert (query[:2] == 0).all()
        assert torch.equal(content[:, 2:], conditioner.embedding[y])


class TestCarry:
    def test_windows_that_go_on_are_one_sequence(self):
        conditioner, y = make(LSTM(WIDTH, layers=2), conditions_first=True), values(3)
        with torch.no_grad():
            # The query tells positions of a window apart, and these are to stand for one sequence.
            conditioner.query.copy_(conditioner.query[:1].expand(LENGTH, -1))
        whole = conditioner(y)
        last, state = torch.full((3,), -1), None
        for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
            logits, state = conditioner.carry(y[:, part], last, state)
            torch.testing.assert_close(logits, whole[:, part])
            last = y[:, part.stop - 1]

    def test_some_may_begin_anew(self):
        conditioner, y = make(LSTM(WIDTH, layers=2), conditions_first=True), values(3)
        _, state = conditioner.carry(y, torch.full((3,), -1))
        logits, _ = conditioner.carry(y, torch.tensor([0, -1, 2]), state)
        same = [torch.allclose(one, two) for one, two in zip(logits, conditioner(y), strict=True)]
        assert same == [False, True, False]

    @pytest.mark.parametrize(
        ("backbone", "ordering", "options"),
        [
            ("transformer", NATURAL, {}),
            ("lstm", Reversed(), {}),
            ("lstm", NATURAL, {"execution": "masked"}),
            ("lstm", NATURAL, {"context_features": 2}),
        ],
    )
    def test_others_are_refused(self, backbone, ordering, options):
        conditioner = make(backbone, ordering, **options)
        assert not conditioner.carries
        with pytest.raises(UserError, match="choose an LSTM over Natural"):
            conditioner.carry(values(), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(("backbone", "number"), [("transformer", 2), ("lstm", 1), ("made", 1)])
def test_what_is_known_on_the_way(backbone, number):
    conditioner, y = make(backbone, conditions_first=True), values()
    logits, features = conditioner.layers(y)
    assert len(features) == number
    torch.testing.assert_close(logits, conditioner(y))
    torch.testing.assert_close(conditioner.head(features[-1]), logits)


@pytest.mark.parametrize(
    ("backbone", "options"), [("transformer", {"execution": "masked"}), ("table", {})]
)
def test_what_is_known_on_the_way_needs_one_pass(backbone, options):
    with pytest.raises(UserError, match="choose a level-causal backbone"):
        make(backbone, **options).layers(values())


class TestNGrams:
    def told(self, name, ordering=NATURAL, order=3):
        """A random conditioner that is told of n-grams, which count for more or less."""
        torch.manual_seed(0)
        backbone = DilatedConvolution(WIDTH, layers=2) if name == "masked" else None
        grams = NGrams(CLASSES, order)
        grams.count([markov(200, CLASSES)])
        backbone = backbone or CAUSAL[name](ordering)
        conditioner = Conditioner(CLASSES, LENGTH, CLASSES, ordering, backbone, grams=grams)
        return shaken(conditioner).eval()

    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("name", ["transformer", "convolution", "table", "masked"])
    def test_logits_depend_on_lower_levels_only(self, name, ordering):
        conditioner, levels = self.told(name, ordering), ordering.levels(LENGTH)
        y = states(CLASSES, LENGTH)[::3]
        logits = conditioner(y)
        for source in range(LENGTH):
            changed = y.clone()
            changed[:, source] = (changed[:, source] + 1) % CLASSES
            seen = (conditioner(changed) - logits).abs().amax((0, 2)) > 1e-6
            assert not (seen & (levels <= levels[source])).any()
            # The right neighbour is told of it by the n-grams, whatever the network makes of it.
            if source + 1 < LENGTH and levels[source] < levels[source + 1]:
                assert seen[source + 1]

    @pytest.mark.parametrize("name", ["transformer", "convolution", "lstm", "masked"])
    @pytest.mark.parametrize("ordering", [NATURAL, Strided(columns=3)], ids=repr)
    def test_logits_of_levels_are_those_of_all(self, name, ordering):
        if name == "lstm" and ordering is not NATURAL:
            pytest.skip("an LSTM reads in one direction")
        conditioner, y = self.told(name, ordering), values()
        logits = conditioner(y)
        levels, members = conditioner.levels(LENGTH, y.device)
        for level, dimensions in enumerate(members[1:], start=1):
            part = conditioner.level_logits(y, level)
            torch.testing.assert_close(part, logits[:, dimensions])
        drawn, part = conditioner.drawn_logits(y, torch.tensor([1, 2, 2, 1, 2, 1]))
        torch.testing.assert_close(part, logits[drawn])
        one_hot = to_one_hot(y, CLASSES, torch.float32)
        torch.testing.assert_close(conditioner(one_hot), logits)

        def decide(dimensions, part):
            torch.testing.assert_close(part, logits[:, dimensions])
            return y[:, dimensions]

        with torch.no_grad():
            begin = torch.where(levels < 1, y, 0)
            assert torch.equal(conditioner.by_levels(begin, decide), y)

    def test_only_a_run_of_known_values_counts(self):
        conditioner = self.told("transformer", Strided(columns=3), order=4)
        runs = conditioner._dimensions_of(LENGTH, torch.device("cpu")).runs
        assert runs.tolist() == [0, 1, 2, 0, 1]

    @pytest.mark.parametrize("without_own", [False, True])
    def test_at_first_the_n_grams_alone_count(self, without_own):
        torch.manual_seed(0)
        grams, text = NGrams(CLASSES, 3), markov(200, CLASSES)
        grams.count([text])
        backbone = Transformer(WIDTH, layers=1, heads=2)
        conditioner = Conditioner(CLASSES, LENGTH, CLASSES, NATURAL, backbone, grams=grams)
        torch.nn.init.zeros_(conditioner.head.weight)
        torch.nn.init.zeros_(conditioner.head.bias)
        conditioner.without_own = without_own
        y = text[:LENGTH].unsqueeze(0)
        own = y[0] if without_own else None
        expected = grams.following(grams.pack(y)[0], torch.arange(LENGTH), own).log()
        torch.testing.assert_close(conditioner(y)[0, 1:], expected[1:].float())

    def test_another_number_of_classes_is_refused(self):
        backbone = Transformer(WIDTH, layers=1, heads=2)
        for classes, outputs in ((4, CLASSES), (CLASSES, 4)):
            with pytest.raises(UserError, match="logits of the classes themselves"):
                Conditioner(CLASSES, LENGTH, outputs, NATURAL, backbone, grams=NGrams(classes))

    def test_an_lstm_that_is_told_of_them_carries_no_state(self):
        conditioner = self.told("lstm")
        assert not conditioner.carries
        with pytest.raises(UserError, match="without a context or n-grams"):
            conditioner.carry(values(), torch.full((6,), -1))
