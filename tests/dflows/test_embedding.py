"""The input of a backbone."""

import pytest
import torch

from dflows.backbones import DilatedConvolution, LevelConvolution, Masked, Table, Transformer
from dflows.classes import Classes
from dflows.embedding import Context, Embedding, Layout
from dflows.errors import UserError
from dflows.orderings import BehindContext, Natural, Parity
from dflows.representations import to_one_hot
from tests.dflows.small import ORDERINGS, WIDTH

CLASSES, LENGTH = 3, 5


def make(backbone, context=None):
    num_levels = int(Parity().levels(LENGTH).max()) + 1
    return Embedding(Classes(CLASSES, LENGTH), num_levels, backbone, context)


def causal():
    return LevelConvolution(WIDTH, layers=1)


class TestLayout:
    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    def test_it_is_what_the_ordering_says(self, ordering):
        levels = ordering.levels(LENGTH)
        layout = Layout.of(levels, torch.device("cpu"), tokens=2)
        assert torch.equal(layout.levels, levels)
        assert len(layout.members) == len(layout.placed) == int(levels.max()) + 1
        for level, (members, placed) in enumerate(zip(layout.members, layout.placed, strict=True)):
            assert members.tolist() == placed == (levels == level).nonzero().flatten().tolist()
        assert layout.shifted.tolist() == [-1, -1, *levels.tolist()]

    def test_a_backbone_knows_no_empty_level(self):
        layout = Layout.of(BehindContext(Natural()).levels(3), torch.device("cpu"))
        assert layout.levels.tolist() == [1, 2, 3]
        assert layout.lowest == 1
        assert layout.shifted.tolist() == [0, 1, 2]
        assert layout.placed[0] == []

    def test_it_can_be_trained_with_after_inference_mode(self):
        with torch.inference_mode():
            layout = Layout.of(Natural().levels(4), torch.device("cpu"))
        assert not layout.levels.is_inference()
        assert not any(members.is_inference() for members in layout.members)


class TestValues:
    def test_indices_and_one_hot_vectors_are_embedded_alike(self):
        embedding, y = make(causal()), torch.randint(CLASSES, (6, LENGTH))
        content = embedding.content(y)
        assert torch.equal(content, embedding.values[y])
        torch.testing.assert_close(embedding.content(to_one_hot(y, CLASSES)), content)

    def test_dimensions_of_other_classes_have_embeddings_of_their_own(self):
        classes = Classes([2, 5, 3], 3)
        embedding, y = Embedding(classes, 2, causal()), classes.draw((6, 3))
        content, offsets = embedding.content(y), torch.tensor([0, 2, 7])
        assert len(embedding.values) == 10
        assert torch.equal(content, embedding.values[y + offsets])
        torch.testing.assert_close(embedding.content(to_one_hot(y, 5)), content)
        some = torch.tensor([2, 0])
        assert torch.equal(embedding.content(y[:, some], some), content[:, some])
        torch.testing.assert_close(
            embedding.content(to_one_hot(y[:, some], 5), some), content[:, some]
        )

    def test_a_backbone_that_embeds_by_itself_gets_the_values(self):
        embedding, y = make(Table(WIDTH, CLASSES, LENGTH)), torch.randint(CLASSES, (6, LENGTH))
        assert embedding.content(y) is y
        assert not list(embedding.parameters())
        with pytest.raises(UserError, match=r"Table has a row for every state.*none for a context"):
            make(Table(WIDTH, CLASSES, LENGTH), context=Context(2))


class TestParameters:
    @pytest.mark.parametrize(
        ("backbone", "expected"),
        [
            (causal, {"values", "query"}),
            (lambda: DilatedConvolution(WIDTH), {"values", "query", "hidden", "current"}),
            (
                lambda: Masked(torch.nn.Linear(WIDTH, WIDTH), WIDTH),
                {"values", "query", "positions", "hidden", "current"},
            ),
        ],
    )
    def test_there_are_those_that_the_backbone_needs(self, backbone, expected):
        embedding = make(backbone())
        assert {name for name, _ in embedding.named_parameters()} == expected
        with_context = make(backbone(), context=Context(4))
        names = {name for name, _ in with_context.named_parameters()}
        assert names == expected | {"context.weight", "context.bias"}


class TestMasked:
    def test_values_of_the_level_and_above_are_hidden(self):
        embedding = make(DilatedConvolution(WIDTH))
        levels = Parity().levels(LENGTH)
        layout = Layout.of(levels, torch.device("cpu"))
        y = torch.randint(CLASSES, (2, LENGTH))
        features, count = embedding.masked(y, layout, torch.tensor([0, 1]), None)
        assert count == 0
        plain = features - embedding.query[levels]
        for row, level in enumerate((0, 1)):
            for d in range(LENGTH):
                visible = int(levels[d]) < level
                content = embedding.values[y[row, d]] if visible else embedding.hidden
                torch.testing.assert_close(plain[row, d], content + embedding.current[level])


class TestContext:
    y = torch.zeros(2, LENGTH, dtype=torch.long)

    def layout(self):
        return Layout.of(Parity().levels(LENGTH), torch.device("cpu"))

    @pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
    def test_tokens_stand_in_front_of_all(self, shape):
        embedding, context = make(causal(), context=Context(4)), torch.randn(shape)
        query, tokens = embedding.causal(self.layout(), context)
        number = 1 if len(shape) == 2 else 3
        assert tokens.shape == (2, number, WIDTH)
        torch.testing.assert_close(tokens, embedding.context(context).reshape(2, -1, WIDTH))
        assert (query[:number] == 0).all()
        assert torch.equal(query[number:], embedding.query[self.layout().levels])
        masked = make(DilatedConvolution(WIDTH), context=Context(4))
        features, count = masked.masked(self.y, self.layout(), torch.tensor([1]), context)
        assert (count, features.shape) == (number, (2, number + LENGTH, WIDTH))

    def test_an_aligned_one_is_added_to_the_queries(self):
        embedding = make(causal(), context=Context(4, aligned=True))
        context = torch.randn(2, LENGTH, 4)
        query, tokens = embedding.causal(self.layout(), context)
        assert tokens is None
        torch.testing.assert_close(
            query, embedding.query[self.layout().levels] + embedding.context(context)
        )
        shorter = Layout.of(Parity().levels(3), torch.device("cpu"))
        torch.testing.assert_close(embedding.causal(shorter, context)[0], query[:, :3])

    def test_its_type_may_be_another(self):
        embedding = make(causal(), context=Context(4)).double()
        _, tokens = embedding.causal(self.layout(), torch.randn(2, 4))
        assert tokens.dtype == torch.float64

    @pytest.mark.parametrize(
        ("context", "given", "message"),
        [
            (Context(4), None, "the flow is conditional, and no context was given"),
            (None, torch.randn(2, 4), "Transformer that takes none: give the conditioner a Cont"),
            (Context(4), torch.randn(2, 3), "has 3 features, and the conditioner expects 4"),
            (Context(4, aligned=True), torch.randn(2, 4), "with 5 dimensions: give a vector for"),
            (Context(4, aligned=True), torch.randn(2, 4, 4), "with 5 dimensions: give a vector"),
        ],
    )
    def test_another_is_refused(self, context, given, message):
        embedding = make(Transformer(WIDTH, heads=2), context=context)
        with pytest.raises(UserError, match=message):
            embedding.causal(self.layout(), given)

    @pytest.mark.parametrize("features", [0, -1])
    def test_one_of_no_features_says_nothing(self, features):
        with pytest.raises(UserError, match=f"features is {features}: give a context at least 1"):
            Context(features)
