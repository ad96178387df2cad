"""A gradient in tokens: the identities of the sum over tokens, the lens against the model's own head, what is kept against plain products and exact
values, the question on a random model of two layers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from estimators.law import eigenbasis
from experiments import cli, lens, publish, report, runs
from experiments.lensing import keeping
from experiments.lensing.estimates import KNOWN, Estimator, estimator
from experiments.lensing.factors import Factors, contributions, factors, gram_factor, leading, oriented, side_of
from experiments.lensing.vocabulary import Lens, overlap, visible
from experiments.pages import lens as pages
from experiments.validation.gradients import linear_layers
from theory.grams import Side

PROMPT = "w3 w8 w5 w21 w2 w30 w11 w7 w16 w0"
TOKENS = len(PROMPT.split())
SIDES: tuple[Side, Side] = ("input", "output")


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def found(llama: Path, model: Any) -> dict[str, Factors]:
    ids = AutoTokenizer.from_pretrained(llama)(PROMPT)["input_ids"]
    return factors(model, torch.tensor([ids]), [name for name in linear_layers(model) if side_of(name)])


def problem(seed: int = 0) -> tuple[Factors, Lens]:
    """Six tokens, a gradient of 5 × 8 with a decaying spectrum, thirty words, whose directions lie on either side; float64."""
    g = torch.Generator().manual_seed(seed)
    X, D = (torch.randn(6, d, generator=g, dtype=torch.float64) * torch.logspace(0, -1, d) for d in (8, 5))
    return Factors(X, D, D.mT @ X), Lens(torch.randn(30, 8, generator=g, dtype=torch.float64), None)


def lens_of(side: Side, looking: Lens) -> Lens:
    return looking if side == "input" else Lens(looking.L[:, :5].contiguous(), None)


class Spoken(Lens):
    """Tokens are named by their numbers."""

    def word(self, token: int) -> str:
        return str(token)


# the sum over tokens


def test_the_sum_over_tokens_is_the_gradient(found: dict[str, Factors]) -> None:
    assert len(found) == 2 * 7
    for name, (X, D, G) in found.items():
        assert G.dtype == torch.float64 and len(X) == len(D) == TOKENS
        total = sum(torch.outer(d, x) for d, x in zip(D, X, strict=True))
        assert float((total - G).abs().max()) <= 1e-10 * float(G.abs().max()), name


def test_of_several_sequences_too(model: Any) -> None:
    ids = torch.arange(8, 20).view(2, 6)
    ((X, D, G),) = factors(model, ids, ["model.layers.1.mlp.up_proj"]).values()
    assert len(X) == 12
    torch.testing.assert_close(D.mT @ X, G, rtol=0, atol=1e-10 * float(G.abs().max()))


def test_the_rank_is_at_most_the_number_of_tokens_and_generically_of_those_with_an_error(found: dict[str, Factors]) -> None:
    """The last token has nothing to predict, and the query of the first sees one key: whatever it is, the attention is the same."""
    for name, (X, D, G) in found.items():
        rank = int(torch.linalg.matrix_rank(G))
        assert rank <= TOKENS
        with_error = int((D.norm(dim=1) > 1e-12 * D.norm()).sum())
        assert with_error == TOKENS - (2 if name.endswith("q_proj") else 1), name
        assert rank == with_error, name
        assert int(torch.linalg.matrix_rank(X)) == TOKENS


def test_equal_tokens_take_from_the_rank_where_the_layer_sees_them_alone(llama: Path, model: Any) -> None:
    ids = AutoTokenizer.from_pretrained(llama)("w3 w8 w3 w8 w3 w5")["input_ids"]
    name = "model.layers.0.self_attn.v_proj"
    assert int(torch.linalg.matrix_rank(factors(model, torch.tensor([ids]), [name])[name].G)) == 2  # of w3, w8; w5 is the last


def test_singular_vectors_lie_in_the_spans_of_the_factors(found: dict[str, Factors]) -> None:
    for X, D, G in found.values():
        rank = int(torch.linalg.matrix_rank(G))
        U, _, Vh = torch.linalg.svd(G)
        for vectors, rows in ((Vh[:rank].mT, X), (U[:, :rank], D)):
            basis, s, _ = torch.linalg.svd(rows.mT, full_matrices=False)
            basis = basis[:, s > 1e-12 * s[0]]
            assert float((vectors - basis @ (basis.mT @ vectors)).abs().max()) < 1e-8  # σ_1/σ_rank of rounding


def test_capturing_leaves_the_model_as_it_was(model: Any) -> None:
    factors(model, torch.arange(8, 14)[None], ["model.layers.0.mlp.down_proj"])
    assert not any(module._forward_hooks for module in model.modules()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("columns", [2, 7])
def test_the_gram_factor_is_that_of_the_product(side: Side, columns: int, generator: torch.Generator) -> None:
    A, C = (torch.randn(d, columns, generator=generator, dtype=torch.float64) for d in (5, 8))
    H, E = gram_factor(A, C, side), A @ C.mT
    torch.testing.assert_close(H @ H.mT, E.mT @ E if side == "input" else E @ E.mT, rtol=0, atol=1e-10)
    U, _, Vh = torch.linalg.svd(E)
    first = Vh[0] if side == "input" else U[:, 0]
    assert float((leading(H, 1)[:, 0] @ first).abs()) == pytest.approx(1, abs=1e-10)


def test_directions_take_the_sign_of_the_row_that_they_say_most_of() -> None:
    X, D, _ = problem()[0]
    for side in SIDES:
        rows = contributions(X, D, side)
        W = oriented(leading(gram_factor(D.mT, X.mT, side), 3), rows)
        products = rows @ W
        assert bool((products.gather(0, products.abs().argmax(0)[None]) > 0).all())
        torch.testing.assert_close(oriented(-W, rows), W)
    torch.testing.assert_close(contributions(X, D, "output").norm(dim=1), contributions(X, D, "input").norm(dim=1))


# the vocabulary


def test_the_lens_is_the_model_s_own_norm_and_head(llama: Path, model: Any, generator: torch.Generator) -> None:
    looking = Lens.of(model, AutoTokenizer.from_pretrained(llama))
    u = torch.randn(32, generator=generator, dtype=torch.float64)
    logits = model.lm_head(model.model.norm(u)).detach()
    expected, scores = logits - logits.mean(), looking.L @ u
    torch.testing.assert_close(scores / scores.norm(), expected / expected.norm(), rtol=0, atol=1e-5)  # the norm is in float32
    assert torch.equal(looking.top(u[:, None], 5)[0], logits.topk(5).indices)
    torch.testing.assert_close(looking.energies(u[:, None]), scores.square())
    torch.testing.assert_close(looking.K, looking.L.mT @ looking.L)
    assert looking.words(torch.tensor([8, 0])) == "yes [PAD]" and looking.word(10**6) in ("<1000000>", "[UNK]")


def test_a_norm_that_is_not_linear_is_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.norm = nn.LayerNorm(32)
    with pytest.raises(runs.WrongInput, match="the final norm of LlamaForCausalLM is a LayerNorm; the lens is linear for RMSNorm alone"):
        Lens.of(model, None)
    with pytest.raises(runs.WrongInput, match="Linear has no final norm and output embeddings"):
        Lens.of(nn.Linear(2, 2), None)


def test_white_space_can_be_seen() -> None:
    assert [visible(text) for text in (" Paris", "\n\t", "", "é", "\x00\xa0", "a b")] == ["␣Paris", "⏎⇥", "∅", "é", "\\x00\\xa0", "a␣b"]


def test_overlap_is_jaccard() -> None:
    a = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert overlap(a, torch.tensor([[3, 2, 1], [4, 2, 3], [4, 5, 6]])).tolist() == [1.0, 0.5, 0.0]


# what is kept


def made(label: str, side: Side, rank: int, seed: int = 0) -> tuple[Estimator, keeping.Exact, Lens]:
    parts, looking = problem(seed)
    looking = Spoken(lens_of(side, looking).L, None)
    return (
        estimator(label, parts, eigenbasis("test", parts.G.mT @ parts.G), rank, side),
        keeping.exactly(parts, side, looking, 3, 4),
        looking,
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("label", ["haar_stiefel", "tokens:dct", "wta_crs"])
def test_sums_over_tokens_are_those_of_plain_products(label: str, side: Side) -> None:
    """Of one draw: through K and the factors, and with Ĝ and all scores formed."""
    means, exact, looking = made(label, side, 2)
    A, C = (part[0] for part in means.draw(1, torch.Generator().manual_seed(3)))
    E, (_, _, G) = A @ C.mT, problem()[0]
    scores, reference = (looking.L @ (M.mT if side == "input" else M) for M in (E, G))
    chosen = reference.square().sum(1).topk(4).indices
    wanted = {
        "signal": (scores * reference).sum() / reference.square().sum(),
        "energy": scores.square().sum() / reference.square().sum(),
        "kept": scores[chosen].square().sum() / reference[chosen].square().sum(),
    }
    row = keeping.keeps(replace(means, draw=lambda n, _: (A.expand(n, -1, -1), C.expand(n, -1, -1))), exact, looking, 2, torch.Generator())
    for name, value in wanted.items():
        assert row[name] == pytest.approx(float(value), rel=1e-10)
    assert row["cosine"] == pytest.approx(
        float(torch.nn.functional.cosine_similarity(scores.flatten(), reference.flatten(), dim=0)), rel=1e-10
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("label", ["haar_stiefel", "coordinate", "spectral", "top_svd", "tokens:coordinate", "wta_crs"])
def test_at_full_rank_everything_is_kept(label: str, side: Side) -> None:
    means, exact, looking = made(label, side, 8)
    row = keeping.keeps(means, exact, looking, 3, torch.Generator().manual_seed(0))
    exactly_one = [f"{name}{end}" for name in (*keeping.STATISTICS, "cosine") for end in ("", "_exact")]
    assert all(row[name] == pytest.approx(1, abs=1e-9) for name in (*exactly_one, *keeping.MEASURED))
    assert row["tokens"] == looking.words(exact.tokens[0])


def z_scores(means: Estimator, exact: keeping.Exact, looking: Lens) -> tuple[list[float], float]:
    """(z of every statistic with an exact value, the largest of 8 standard errors over the exact value) of 1000 draws."""
    row = keeping.keeps(means, exact, looking, 1000, torch.Generator().manual_seed(1))
    errors = {name: max(row[f"{name}_error"], 1e-11 * abs(row[f"{name}_exact"])) for name in keeping.STATISTICS}
    scores = [(row[name] - row[f"{name}_exact"]) / error for name, error in errors.items()]
    return scores, max(8 * error / abs(row[f"{name}_exact"]) for name, error in errors.items())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("label", KNOWN)
def test_measured_and_exact_agree(label: str, side: Side) -> None:
    scores, resolution = z_scores(*made(label, side, 3))
    assert resolution <= 0.5 and max(map(abs, scores)) < 5


MUTANTS: dict[str, Callable[[Estimator], Estimator]] = {
    "no noise": lambda e: replace(e, gram=e.mean.T @ e.mean if e.gram.shape[0] == 8 else e.mean @ e.mean.T),
    "noise spread evenly": lambda e: replace(e, gram=np.trace(e.gram) / len(e.gram) * np.eye(len(e.gram))),
    "scaled wrongly": lambda e: replace(e, draw=lambda n, g: tuple(1.3 * part for part in e.draw(n, g))),  # pyright: ignore
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("label", ["haar_stiefel", "tokens:coordinate", "wta_crs"])
def test_what_is_wrong_is_seen(label: str, mutant: str, side: Side) -> None:
    means, exact, looking = made(label, side, 3)
    assert max(map(abs, z_scores(MUTANTS[mutant](means), exact, looking)[0])) > 5


def test_on_the_features_output_directions_stay_among_the_errors() -> None:
    """GVVᵀ has the columns of G: what it says of outputs is a mixture of the δ_i; of inputs it may say anything. On the tokens both stay."""
    parts, _ = problem()
    X, D = parts.X[:3], parts.D[:3]
    few = Factors(X, D, D.mT @ X)
    spectrum = eigenbasis("test", few.G.mT @ few.G)
    outside = lambda W, rows: float((W - rows.mT @ torch.linalg.lstsq(rows.mT, W).solution).abs().max())  # noqa: E731
    for label, inputs_stay in (("haar_stiefel", False), ("tokens:gaussian", True), ("wta_crs", True)):
        A, C = estimator(label, few, spectrum, 2, "input").draw(1, torch.Generator().manual_seed(0))
        A, C = A[0], C[0]
        assert outside(leading(gram_factor(A, C, "output"), 2), D) < 1e-10
        assert (outside(leading(gram_factor(A, C, "input"), 2), X) < 1e-10) == inputs_stay


def test_directions_are_matched_whatever_their_order_and_sign() -> None:
    W = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    found, alike = keeping.matched(torch.stack([-W[:, 2], W[:, 0], W[:, 1]], 1), W, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(found, W)
    torch.testing.assert_close(alike, torch.ones(3, dtype=torch.float64))
    found, alike = keeping.matched(W[:, 1:2], W, torch.eye(8, dtype=torch.float64))
    assert alike.tolist() == pytest.approx([0, 1, 0]) and not bool(found[:, [0, 2]].any())


# the question


@pytest.fixture(scope="module")
def asked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    folder = tmp_path_factory.mktemp("lens")
    return lens.main(lens.Config(model=str(llama), prompt=PROMPT, rank=4, top=5, draws=64, runs_dir=folder, quiet=True))


def test_the_question_answers(asked: runs.Run) -> None:
    rows = asked.rows()
    layers = [row for row in rows if row["kind"] == "layer"]
    assert len(layers) == 14 and all(row["rank"] in (TOKENS - 1, TOKENS - 2) and row["defect"] < 1e-10 for row in layers)
    assert {row["side"] for row in layers if row["layer"].endswith(("o_proj", "down_proj"))} == {"output"}
    kept = [row for row in rows if row["kind"] == "kept"]
    assert len(kept) == 14 * 7 and all(0 <= row["overlap"] <= 1 and row["energy_exact"] > 0 for row in kept)
    means = {row["law"]: row for row in rows if row["kind"] == "estimator"}
    assert list(means) == list(lens.Config().law)
    assert all(row["signal_exact"] == pytest.approx(1) for law, row in means.items() if law != "top_svd")
    assert means["top_svd"]["overlap"] == 1 and means["top_svd"]["energy_exact"] < 1
    directions = [row for row in rows if row["kind"] == "direction"]
    assert len(directions) == 14 * 6 and all(len(row["tokens"].split(" ")) == 5 for row in directions)
    assert all(row["word"] in PROMPT.split() for row in directions if row["what"] != "direction")


def test_an_interrupted_run_continues_to_the_same_rows(asked: runs.Run, tmp_path: Path) -> None:
    copy = tmp_path / asked.path.name
    shutil.copytree(asked.path, copy)
    (copy / "DONE").unlink()
    text = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(text[: len(text) // 2])
    values = {key: value for key, value in asked.config.items() if key != "question"}
    again = lens.main(lens.Config(**{**values, "law": tuple(values["law"]), "layers": (), "runs_dir": tmp_path, "quiet": True}))
    assert again.path == copy and again.rows() == asked.rows()


def test_layers_by_block_and_by_name(model: Any) -> None:
    assert lens.chosen(model, ("1",)) == [name for name in lens.chosen(model, ()) if ".1." in name]
    assert lens.chosen(model, ("0.mlp.down_proj", "k_proj")) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.k_proj",
    ]


def test_it_is_shown_reported_and_published(asked: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lens", "--model", asked.config["model"], "--prompt", PROMPT, "--rank", "4", "--top", "5", "--draws", "64"]
    command += ["--runs-dir", str(asked.path.parent), "--quiet"]
    cli.main(command)
    shown = capsys.readouterr().out
    assert "kept of a gradient" in shown and "1 down_proj" in shown and "tokens:coordinate" in shown
    cli.main([*command, "--json"])
    told = json.loads(capsys.readouterr().out)["results"][0]
    assert told["config"]["question"] == "lens" and {row["kind"] for row in told["rows"]} == set(publish.KEPT["lens"])
    page = report.main(report.Config(run=(asked.path,), out=tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "<svg" in page and "A gradient in tokens" in page and "wta_crs" in page
    publish.main(publish.Config(run=(asked.path,), out=tmp_path))
    label = asked.path.name.split("-", 1)[1].rsplit("-", 1)[0]
    rows = pages.committed(label, tmp_path)
    assert pages.lines(rows) == pages.lines(asked.rows()) and pages.said(rows) == pages.said(asked.rows())
    text = pages.markdown(label, tmp_path)
    assert "| `wta_crs` | unbiased |" in text and "| 1 down_proj |" in text


def test_tokens_in_a_cell_of_a_table() -> None:
    assert pages.code("a|b") == "`a\\|b`" and pages.code("a `` b") == "``` a `` b ```"


@pytest.mark.parametrize("name", pages.COMMITTED)
def test_the_figure_is_of_the_committed_run(name: str) -> None:
    figure, file = pages.figure_of(name), pages.RESULTS / "lens" / f"{name}.svg"
    assert (figure is not None) == file.exists()
    if figure is not None:
        committed = file.read_text(encoding="utf-8")
        labels = {text.get_text() for ax in figure.axes for text in (*ax.get_xticklabels(), ax.title)} - {""}
        assert labels and all(f">{label}<" in committed for label in (*labels, *lens.Config().law))


@pytest.mark.parametrize("name", pages.COMMITTED)
def test_what_is_said_of_the_committed_runs(name: str) -> None:
    kept = [row for row in pages.committed(name) if row["kind"] == "kept"]

    def mean(side: Side, column: str, *laws: str) -> list[float]:
        return [float(np.mean([row[column] for row in kept if (row["law"], row["side"]) == (law, side)])) for law in laws]

    blind, on_tokens = ("haar_stiefel", "gaussian"), ("tokens:coordinate", "wta_crs")
    reads, writes = ({column: partial(mean, side, column) for column in ("overlap", "cosine_exact")} for side in SIDES)
    assert min(reads["overlap"]("spectral", "top_svd")) > max(reads["overlap"](*on_tokens))  # who knows the gradient keeps its tokens
    assert min(reads["overlap"](*on_tokens)) > max(reads["overlap"](*blind))
    assert min(writes["overlap"](*blind)) > max(writes["overlap"](*on_tokens))
    assert max(writes["cosine_exact"](*blind)) < 0.5 * min(writes["cosine_exact"](*on_tokens))
    for row in kept:
        if row["side"] == "output" and row["law"] in (*blind, "coordinate"):
            assert row["kept_exact"] == pytest.approx(row["energy_exact"], rel=1e-6)  # all are multiplied alike
    estimators = [row for row in pages.committed(name) if row["kind"] == "estimator"]
    assert all(row["holds"] for row in estimators) and max(estimators, key=lambda row: row["resolution"])["law"] == "coordinate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--law haar", "unknown law 'haar', known are gaussian"),
        ("--law tokens:spectral", "unknown law 'tokens:spectral'"),
        ("--law", "law needs at least one value"),
        ("--rank 1.5", "rank must be a positive integer, or a fraction of n in (0, 1], got 1.5"),
        ("--rank 33", "rank=33 is more than the 32 features of model.layers.0.self_attn.q_proj"),
        ("--draws 1", "draws must be at least 2, got 1"),
        ("--top 0", "top must be at least 1, got 0"),
        ("--top 999", "top=999 is more than the 51 tokens of the vocabulary"),
        ("--layers 2", "no layer '2': blocks are 0 to 1, names end as 1.mlp.down_proj does"),
        ("--layers embed_tokens", "no layer 'embed_tokens'"),
        ("--prompt w1", "the prompt has 1 tokens; it must have between 3 and the 64 of the model"),
        ("--prompt w1,w2", "the prompt has 1 tokens"),
        ("--prompt=", "the prompt is empty"),
        ("--resolution nan", "resolution must be positive and finite"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["lens", "--model", str(llama), "--prompt", PROMPT, "--runs-dir", str(tmp_path / "runs"), "--quiet"]
    assert cli.main([*base, *arguments.split()]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1 and told.startswith("lowrank: lens: ")
    assert not list(tmp_path.glob("runs/*"))


def test_a_model_without_a_tokenizer_and_one_that_does_not_continue_text(
    llama: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*token*"))
    for folder, message in ((bare, "cannot be loaded"), (bert, "head=response"), (tmp_path / "nothing", "cannot be loaded")):
        assert cli.main(["lens", "--model", str(folder), "--prompt", PROMPT, "--runs-dir", str(tmp_path / "runs"), "--quiet"]) == 2
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))


def test_the_small_model_in_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reviews: Path) -> None:
    """Trained here, with the tokenizer of its corpus; a second start has the weights of the first."""
    del reviews
    few = "lens tiny --steps 2 --layers 3.mlp.down_proj 0.self_attn.q_proj --law top_svd --draws 2 --quiet --runs-dir"
    command = [*few.split(), str(tmp_path)]
    assert cli.main(command) == 0
    (path,) = tmp_path.glob("lens-tiny-*")
    first = runs.load(path).rows()
    (path / "DONE").unlink()
    (path / "metrics.jsonl").write_text("")
    monkeypatch.setattr("experiments.training.models.train", lambda *_, **__: pytest.fail("trained again"))
    assert cli.main(command) == 0 and runs.load(path).rows() == first
