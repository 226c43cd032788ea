"""Continuing a text: which token is chosen, what it is chosen from, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loaded_models import golden_recipe, initial_model, known_model, moepp, start_run

from data_pipeline.document import DataError
from moepp_ds.controller import RoutingInputs
from moepp_ds.generate import Sampling, choose, complete, generate
from moepp_ds.load import load_model


def test_greedy_counts_up_to_the_end_of_the_document() -> None:
    """The known model says v + 1 after v, and 1 ends a document."""
    model = known_model().model
    assert generate(model, [3, 5], max_new_tokens=9) == [6, 7, 0, 1]
    assert generate(model, [3, 5], max_new_tokens=3) == [6, 7, 0]
    assert generate(model, [3, 1], max_new_tokens=2) == [2, 3]  # an end in the prompt is no end
    assert generate(model, [7], max_new_tokens=0) == []
    assert generate(model, [4], max_new_tokens=4, sampling=Sampling(temperature=0.5, seed=3)) == [5, 6, 7, 0]


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    """After 3 comes 4, which is no id of a tokenizer of 4; the others are equally likely, and the first is taken."""
    model = known_model().model
    assert generate(model, [3], max_new_tokens=2, vocab_size=4) == [0, 1]
    drawn = {generate(model, [3], max_new_tokens=1, vocab_size=4, sampling=Sampling(1.0, 1.0, s))[0] for s in range(40)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("document_attention", ["false", "true"])
def test_greedy_is_the_most_probable_token_each_time(document_attention: str) -> None:
    """Against rows through the model as it trains, with weights that make every part count."""
    model = initial_model(golden_recipe(f"model.document_attention={document_attention}"), std=0.3)
    prompt = [5, 300, 2, 44]
    new = generate(model, prompt, max_new_tokens=6)
    assert model.training  # as it was
    with torch.no_grad():
        for place in range(len(new)):
            row = torch.tensor([[*prompt, *new[:place]]])
            hidden_BSD, _ = model.eval().hidden(row)
            assert new[place] == int((hidden_BSD[0, -1] @ model.head.weight.t()).argmax())
    alone = generate(model, [44], max_new_tokens=6)
    assert (new == alone) == (document_attention == "true")  # then a document does not see the one before


def test_biases_of_the_controller_count() -> None:
    model = initial_model(golden_recipe(), std=0.3)
    bias_LE = torch.zeros(3, 8).index_fill_(1, torch.tensor([6, 7]), 9.0)  # everyone copies, or does nothing
    prompt = [5, 300, 9, 44]
    free, steered = (generate(model, prompt, max_new_tokens=8, routing=RoutingInputs(b)) for b in (None, bias_LE))
    assert free != steered


def frequencies(sampling: Sampling, draws: int = 4000) -> list[float]:
    """How often each token was drawn where their probabilities are 0.2, 0.5 and 0.3."""
    generator = torch.Generator().manual_seed(sampling.seed)
    logits_V = torch.tensor([0.2, 0.5, 0.3]).log() + 7
    drawn = torch.tensor([choose(logits_V, sampling, generator) for _ in range(draws)])
    return (torch.bincount(drawn, minlength=3) / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [0, 1, 0]),
        (1.0, 1.0, [0.2, 0.5, 0.3]),
        (0.5, 1.0, [4 / 38, 25 / 38, 9 / 38]),  # probabilities squared
        (1.0, 0.49, [0, 1, 0]),
        (1.0, 0.5, [0, 1, 0]),  # the first alone holds half
        (1.0, 0.51, [0, 5 / 8, 3 / 8]),
        (1.0, 0.8, [0, 5 / 8, 3 / 8]),
        (1.0, 0.81, [0.2, 0.5, 0.3]),
        (1.0, 1e-9, [0, 1, 0]),  # one is always left
        (1e-4, 1.0, [0, 1, 0]),
        (1e-310, 1.0, [0, 1, 0]),  # 1 over it is no number
    ],
)
def test_what_is_drawn(temperature: float, top_p: float, expected: list[float]) -> None:
    """4,000 draws: a frequency is within 0.03 of its probability unless one is off by four standard deviations."""
    assert frequencies(Sampling(temperature, top_p, seed=1)) == pytest.approx(expected, abs=0.03)


def test_a_seed_gives_one_text() -> None:
    model = initial_model(golden_recipe(), std=0.3)
    texts = [generate(model, [5, 9], max_new_tokens=12, sampling=Sampling(1.0, 0.9, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_texts() -> None:
    loaded = known_model()
    found = complete(loaded, "3 5", max_new_tokens=9)
    assert (found.prompt, found.new, found.text) == ([3, 5], [6, 7, 0, 1], "3 5 6 7 0")
    assert complete(loaded, "3 5", max_new_tokens=2).text == "3 5 6 7"
    assert complete(loaded, "4 " * 60, max_new_tokens=4).new == [5, 6, 7, 0]


def test_what_cannot_be_continued() -> None:
    loaded = known_model()
    with pytest.raises(DataError, match="the text is empty"):
        complete(loaded, "", max_new_tokens=4)
    with pytest.raises(DataError, match="60 tokens of the prompt and 5 new ones are more than the 64 of a row .* use"):
        complete(loaded, "4 " * 60, max_new_tokens=5)
    with pytest.raises(DataError, match="64 tokens of the prompt and 1 new ones .* trained on; shorten the prompt, or"):
        complete(loaded, "4 " * 64, max_new_tokens=1)
    with pytest.raises(DataError, match="encodes to the end-of-document id 1"):
        complete(loaded, "4 1", max_new_tokens=5)
    for temperature in (-0.5, float("inf"), float("nan")):
        with pytest.raises(DataError, match="temperature .* must be 0"):
            Sampling(temperature=temperature)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(DataError, match="top_p .* must lie above 0 and be at most 1"):
            Sampling(top_p=top_p)
    for seed in (-1, 2**64):
        with pytest.raises(DataError, match="seed .* must be a whole number from 0 to 18446744073709551615"):
            Sampling(seed=seed)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = start_run(tmp_path / "run", std=0.3)
    asked = ["generate", str(tmp_path / "run"), "--prompt", "import os", "--max-new-tokens", "5"]
    assert moepp(monkeypatch, *asked) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("import os") and greedy.endswith("\n")
    assert moepp(monkeypatch, *asked, "--temperature", "1", "--top-p", "0.9", "--seed", "3") == 0
    drawn = capsys.readouterr().out
    assert drawn != greedy and drawn.startswith("import os")
    assert moepp(monkeypatch, *asked, "--temperature", "1", "--top-p", "0.9", "--seed", "3") == 0
    assert capsys.readouterr().out == drawn
    assert moepp(monkeypatch, *asked, "--temperature", "-1") == 1
    assert "error: temperature -1 must be 0" in capsys.readouterr().err
    loaded = load_model(tmp_path / "run", device="cpu")
    prompt = loaded.encode("import os")
    assert loaded.tokenizer.decode(prompt + generate(model, prompt, max_new_tokens=5)) + "\n" == greedy
