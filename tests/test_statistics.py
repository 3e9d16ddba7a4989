"""Intervals, tables and summaries against small cases worked out by hand, and against other code for the same formula."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO_ROOT
from scipy import stats
from svg import points_in

import evaluate_vqa
from siq_vl.ablation import comparison
from siq_vl.ablation.arms import Arm, Plan, jobs_of, read_plan
from siq_vl.evaluation import generation, report, tables
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.metrics import METRICS
from siq_vl.evaluation.predictions import Prediction
from siq_vl.evaluation.statistics import Estimate, mcnemar, paired_bootstrap, paired_difference, ratio_of_totals, wilson
from siq_vl.evaluation.summaries import before_after, summarize, table3
from siq_vl.parsing.answers import is_correct, number_in
from siq_vl.parsing.arithmetic import false_statements
from siq_vl.plots import COLOURS, length_plot, running_accuracy_plot

# Intervals


def test_wilson_lies_between_0_and_1_at_both_ends():
    for count in range(1, 200):
        assert 0 <= wilson(0, count)[0] < 1e-12 and 1 - 1e-12 < wilson(count, count)[1] <= 1
        low, high = wilson(count / 2, count)
        assert (low + high) / 2 == pytest.approx(0.5) and 0 < low < high < 1


def test_the_bootstrap_has_the_quantiles_of_the_binomial():
    count, won = 400, 100
    before, after = [False] * count, [True] * won + [False] * (count - won)
    mean, low, high = paired_bootstrap(before, after)
    binomial = stats.binom(count, won / count)
    assert mean == 0.25
    assert low * count == pytest.approx(binomial.ppf(0.025), abs=1) and abs(low * count - binomial.ppf(0.05)) > 1
    assert high * count == pytest.approx(binomial.ppf(0.975), abs=1)
    assert paired_bootstrap(after, before)[0] == -0.25


def test_paired_differences_are_after_minus_before():
    before, after = [True, True, False, False, False], [True, False, True, True, True]
    mean, half = paired_difference(before, after)
    differences = np.array([0, -1, 1, 1, 1])
    assert mean == pytest.approx(0.4)
    assert half == pytest.approx(1.959964 * differences.std(ddof=1) / math.sqrt(5))
    assert mcnemar(before, after) == (1, 3, 2 * (1 + 4) / 2**4)


def by_hand(values: np.ndarray) -> float:
    """The half-width of a mean over seeds and questions: two-way analysis of variance, cell by cell, and Satterthwaite."""
    seeds, questions = values.shape
    mean = sum(values[s][q] for s in range(seeds) for q in range(questions)) / (seeds * questions)
    of_seed = [sum(values[s]) / questions for s in range(seeds)]
    of_question = [sum(values[s][q] for s in range(seeds)) / seeds for q in range(questions)]
    ms_seeds = questions * sum((m - mean) ** 2 for m in of_seed) / (seeds - 1)
    ms_questions = seeds * sum((m - mean) ** 2 for m in of_question) / (questions - 1)
    rest = 0.0
    for s in range(seeds):
        for q in range(questions):
            rest += (values[s][q] - of_seed[s] - of_question[q] + mean) ** 2
    free = (seeds - 1) * (questions - 1)
    rest /= free
    ms_seeds, ms_questions = max(ms_seeds, rest), max(ms_questions, rest)  # no component below zero
    total = ms_seeds + ms_questions - rest
    freedom = total**2 / (ms_seeds**2 / (seeds - 1) + ms_questions**2 / (questions - 1) + rest**2 / free)
    return stats.t(freedom).ppf(0.975) * math.sqrt(total / (seeds * questions))


@pytest.mark.parametrize("spread", [(0.3, 0.4, 0.2), (0.0, 0.5, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.3)])
def test_seeds_and_questions_are_crossed_random_effects(spread):
    rng = np.random.default_rng(5)
    for seeds, questions in ((2, 9), (3, 12), (5, 4)):
        answers = spread[0] * rng.normal(size=(seeds, 1)) + spread[1] * rng.normal(size=questions)
        answers = answers + spread[2] * rng.normal(size=(seeds, questions))
        found = ratio_of_totals(answers)
        assert found.half_width == pytest.approx(by_hand(answers))
        assert found.interval == pytest.approx((answers.mean() - found.half_width, answers.mean() + found.half_width))
        assert found.by_seed == pytest.approx(answers.mean(axis=1))


def test_one_seed_has_the_t_interval_of_its_questions():
    scores = np.array([[1.0, 0.0, 0.0, 1.0, 1.0]])
    expected = stats.t(4).ppf(0.975) * scores.std(ddof=1) / math.sqrt(5)
    assert ratio_of_totals(scores).half_width == pytest.approx(expected)


def test_a_ratio_of_totals_is_linearized():
    """Its influence is the derivative: of an answer that counts a little more, the ratio moves by it."""
    stated, contradicted = np.array([[4.0, 1.0, 5.0], [2.0, 3.0, 0.0]]), np.array([[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    found = ratio_of_totals(contradicted, stated)
    assert found.value == 5 / 15 != (contradicted / stated.clip(1)).mean()
    for place in np.ndindex(2, 3):
        weights = np.ones((2, 3))
        weights[place] += 1e-6
        moved = (weights * contradicted).sum() / (weights * stated).sum()
        assert found.influence[place] == pytest.approx((moved - found.value) / 1e-6 * 6, abs=1e-4)
    other = ratio_of_totals(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    assert (found - other).value == found.value - 0.5
    assert np.array_equal((found - other).influence, found.influence - other.influence)


# Metrics whose shares have unlike parts


def test_pope_with_more_false_alarms_than_misses():
    said = ["yes"] * 5 + ["no"] * 5  # of the yeses three are right, of the noes four
    true = [["yes"]] * 3 + [["no"]] * 2 + [["no"]] * 4 + [["yes"]]
    computed = METRICS["pope"].compute([*said, "maybe"], [*true, ["no"]])
    assert (computed["precision"], computed["recall"]) == (3 / 6, 3 / 4)
    assert computed["f1"] == pytest.approx(2 * 3 / (2 * 3 + 3 + 1))
    assert (computed["yes_rate"], computed["accuracy"]) == (5 / 11, 7 / 11)


def test_chair_is_over_mentions_and_over_captions():
    vocabulary = {"cat": (), "dog": (), "bus": ()}
    captions = ["a dog, a dog and a cat", "a bus and a bus", "a cat", "nothing"]
    computed = METRICS["chair"].compute(captions, [["cat"], ["cat"], ["cat"], []], vocabulary=vocabulary)
    assert computed["chair_i"] == 4 / 6 and computed["chair_s"] == 2 / 4
    scene = "scene: top-left star red, top-right house blue"
    outputs = ["green kite. green ball. The star is red", "star red", "seven"]
    computed = METRICS["hallucination"].compute(outputs, [scene] * 3)
    assert computed["chair_i"] == 4 / 8 and computed["chair_s"] == 1 / 3
    assert computed["hallucination_rate"] == 2 / 4 and computed["hallucinated_outputs"] == 1 / 3


# Tables and summaries


def predicted(place: int, score: float = 1.0, group: str = "held out", **options) -> Prediction:
    made = {"id": str(place), "group": group, "domain": "charts", "type": "sum", "multi_step": False, "question": "?"}
    made |= {"gold": "1", "output": "1", "rationale": "", "answer": "1", "well_formed": False}
    return Prediction(**{**made, "correct": score >= 0.5, "score": score, **options})


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


UNSCORED = {"fault": kept.IMAGE, "correct": False}


def test_losses_are_of_ordinary_questions(processor, monkeypatch):
    asked = {}

    def record(model, processor, items, traces, **options):
        asked["trace" if traces else "answer"] = {item.group for item in items}
        return {item.id: 1.0 for item in items}

    monkeypatch.setattr(evaluate_vqa, "reference_losses", record)
    options = SimpleNamespace(before_after=True, batch_size=2)
    settings = SimpleNamespace(blind=False, template_options=None)
    items = held_out_items(5)
    assert {item.group for item in items} == {"held out", "hard", "combinations"}
    losses = evaluate_vqa.losses_of(options, "name", items, None, processor, settings)
    assert asked == {"trace": {"held out"}, "answer": {"held out"}} and losses.keys() == asked.keys()


def test_tables_count_scores_of_scored_questions():
    made = [predicted(0, 1.0), predicted(1, 0.3, multi_step=True), predicted(2, 0.0, multi_step=True)]
    made += [predicted(3, 0.0, **UNSCORED), predicted(4, 0.9, "combinations"), predicted(5, 0.2, "hard")]
    found = cells(tables.accuracy_table({"model": made}))
    half = {count: 50 * (wilson(right, count)[1] - wilson(right, count)[0]) for right, count in ((1.3, 3), (0.3, 2))}
    assert found["all"] == found["charts"] == ["3", f"43.3 ±{half[3]:4.1f}"]
    assert found["- multi-step"] == ["2", f"15.0 ±{half[2]:4.1f}"]
    assert found["- single-step"][1].startswith("100.0") and found["- single-step"][0] == "1"
    assert found["new combinations"][1].startswith("90.0") and found["hard (reported only)"][1].startswith("20.0")
    low, high = wilson(1.3, 3)
    assert cells(tables.type_table({"model": made}))["charts, sum"] == [
        "3",
        f"43.3 [{100 * low:.0f}, {100 * high:.0f}]",
    ]
    assert [each.id for each in tables.ordinary(made)] == ["0", "1", "2", "3"]


def test_comparisons_are_after_minus_before():
    before = [predicted(place, score) for place, score in enumerate((1.0, 0.4, 0.0, 0.0))]
    after = [predicted(place, score) for place, score in enumerate((0.4, 1.0, 1.0, 0.8))]
    assert tables.comparison_line("b over a", before, after).startswith("b over a: +45.0 points")
    assert tables.difference_line("b over a", before, after).startswith("b over a: +50.0 points")
    assert "3 wrong -> right, 1 right -> wrong" in tables.comparison_line("b over a", before, after)


def test_captions_say_what_was_shown():
    scores = {way: dict.fromkeys(("scenes", "charts", "documents"), share) for way, share in
              (("picture", 0.9), ("blind", 0.1), ("shuffled", 0.3))}  # fmt: skip
    rows = cells(tables.caption_table(scores, 7))
    assert rows["caption facts right (7 pictures)"] == ["its picture", "no picture", "another's picture"]
    assert rows["charts"] == ["90.0", "10.0", "30.0"]


def test_summaries_count_scored_questions_alone():
    long = {"rationale": "a b c", "stated": 4, "contradicted": 1, "rouge_l": 0.5, "well_formed": True}
    made = [predicted(0, 1.0, **long), predicted(1, 0.0, stated=1, contradicted=1, rouge_l=0.0)]
    made += [predicted(2, 0.5), predicted(3, 0.0, **{**long, "contradicted": 4, **UNSCORED})]
    found = summarize(made)
    assert found.accuracy == 0.5 and found.length == 1.0 and found.rouge_l == 0.25
    assert found.hallucination == 2 / 5 and found.hallucinated == 1.0 and found.well_formed == pytest.approx(1 / 3)
    low, high = wilson(1.5, 3)
    rows = cells(table3({"model": found}))
    assert rows["accuracy, percent"] == [f"50.0 ±{50 * (high - low):.1f}"]
    assert rows["hallucination, percent of stated facts"] == ["40.0"]
    losses = {"model": {"trace": {"a": 2.0}, "answer": {"a": 1.0}}}
    rows = cells(before_after({"model": made, "other": [predicted(0, 1.0)]}, losses))
    assert rows["correct rate"][:2] == ["0.6667", "1.0000"] and rows["3 questions"][0] == "model"
    assert rows["average loss of the teacher's trace, nats a token"][0] == "2.000"
    assert rows["- of the gold answer without tags or rationale"][0] == "1.000"
    assert rows["accuracy, percent"][2] == "+50.0"


def test_another_picture_is_another_one(monkeypatch):
    """A model that says what it is shown has full marks on its picture, and those of its neighbour's facts on another's."""
    items = held_out_items(9)[:9]
    said = {item.image.tobytes(): item.caption for item in items}
    monkeypatch.setattr(
        kept, "generate_texts", lambda model, processor, prompts, images, progress: [
            said[shown[0].tobytes()] if shown else "" for shown in images
        ]
    )  # fmt: skip
    found = kept.caption_scores(None, None, items)
    assert set(found) == {"picture", "blind", "shuffled"}
    for domain in ("scenes", "charts", "documents"):
        own = [item for item in items if item.domain == domain]
        moved = [kept.fact_score(own[(place + 1) % len(own)].caption, item.caption) for place, item in enumerate(own)]
        assert found["picture"][domain] == 1 and found["blind"][domain] == 0
        assert found["shuffled"][domain] == pytest.approx(sum(moved) / len(own))
        assert found["shuffled"][domain] < 1


# Ablations


def test_measures_are_of_scored_ordinary_questions():
    single = [predicted(0, 1.0, stated=4, contradicted=1, rationale="a b"), predicted(1, 0.0, stated=0, rationale="c")]
    several = [predicted(2, 1.0, multi_step=True, stated=1, contradicted=1), predicted(3, 1.0, multi_step=True)]
    left_out = [predicted(4, 0.0, "combinations"), predicted(5, 0.0, "hard"), predicted(6, 1.0, **UNSCORED)]
    found = comparison.estimates({"answers": [[*single, *several, *left_out]] * 2})
    assert (found["accuracy"].value, found["single_step"].value, found["multi_step"].value) == (0.75, 0.5, 1.0)
    assert found["hallucination"].value == 2 / 5 and found["length"].value == 3 / 4
    with pytest.raises(ValueError, match="different questions"):
        comparison.estimates({"answers": [single, [single[1], several[0]]]})
    bare = comparison.estimates({"answers": [[predicted(0, 1.0), predicted(1, 0.0), *several]]})
    assert bare["direct_single_step"].value == 0.5 and "length" not in bare  # it answers directly however it is asked


def test_results_have_both_ends_and_differences_first_minus_second():
    high, low = (ratio_of_totals(np.array([[a, b, a], [a, b, b]])) for a, b in ((1.0, 0.8), (0.5, 0.1)))
    results = {
        name: comparison.Result(name, 1, [1.0], {"accuracy": found}) for name, found in (("a", high), ("b", low))
    }
    numbers = comparison.numbers(results, [("a", "b")])
    found = numbers["arms"]["a"]["measures"]["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((high.value - high.half_width, high.value + high.half_width))
    assert numbers["differences"][0]["measures"]["accuracy"]["value"] == high.value - low.value > 0
    table = comparison.report(results, [("a", "b")])
    assert f"{100 * high.value:.1f} ± {100 * high.half_width:.1f}" in table
    assert f"+{100 * (high.value - low.value):.1f} ± " in table


def test_every_arm_trains_for_its_own_steps_from_its_own_seed(tmp_path):
    arms = {"long": Arm("twice", "train.py {one}", steps=2.0), "plain": Arm("once", "train.py")}
    commands = {"answers": "ask.py"}
    plan = Plan(
        10, 4, 2, 5, tmp_path / "start", {}, {"one": "make.py --count {rows}"}, commands, arms, (("long", "plain"),)
    )
    jobs = {job.name: job for job in jobs_of(plan, tmp_path)}
    for seed in (1, 2):
        assert f"--max_steps 20 --seed {seed} " in jobs[f"long/seed{seed}"].command
        assert f"--max_steps 10 --seed {seed} " in jobs[f"plain/seed{seed}"].command
        assert tmp_path / "start" / "model.safetensors" in jobs[f"plain/seed{seed}"].reads
        assert "stores/one" in jobs[f"long/seed{seed}"].after
    assert "--count 48 " in jobs["stores/one"].command  # 10 steps of 4 rows, and a fifth more
    again = Plan(10, 4, 2, 5, tmp_path / "start", {}, {"one": "make.py --seed 1 --count {rows}"}, commands, arms, ())
    assert {job.makes for job in jobs_of(again, tmp_path) if job.kind == "traces"} != {jobs["stores/one"].makes}


def test_the_shipped_plan_is_the_one_that_the_results_are_of():
    """The steps of every arm, the control's among them, and the pairs that are compared."""
    plan = read_plan(REPO_ROOT / "recipes/tiny/ablations.yaml")
    arms, pairs = (REPO_ROOT / "docs/ablations.md").read_text(encoding="utf-8").split("## Differences")
    for line in arms.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[0] in plan.arms and len(row) > 3:
            trained = plan.arms[row[0]].train is not None
            assert int(row[2]) == (round(plan.steps * plan.arms[row[0]].steps) if trained else 0), row[0]
    for first, second in plan.compare:
        assert f"\n| {first} - {second} " in pairs
    assert pairs.count(" - ") >= len(plan.compare) == len({*plan.compare})
    assert {pair for pair in plan.compare if "control" in pair} >= {(arm, "control") for arm in ("structured", "terse")}


# Plots


def test_plots_rise_where_numbers_do():
    line = points_in(running_accuracy_plot({"model": [0.0, 0.5, 0.75]}), COLOURS[0])
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)  # down is up in an SVG
    assert len(line) == 3 and len({y for _, y in line}) == 3
    # Of many points the last one is drawn, whatever the distance to the one before.
    last = points_in(running_accuracy_plot({"model": [0.0] * 998 + [1.0]}), COLOURS[0])[-1]
    assert last == points_in(running_accuracy_plot({"model": [0.0] * 998 + [1.0], "other": [0.5]}), COLOURS[0])[-1]
    assert last[1] < line[-1][1]
    drawn = length_plot({"few": [1], "many": [1] * 9})
    assert points_in(drawn, COLOURS[0]) == points_in(drawn, COLOURS[1])  # shares, not counts


def test_estimates_of_unlike_questions_have_no_difference():
    with pytest.raises(ValueError, match="no paired difference"):
        Estimate(0.0, np.zeros((2, 3))) - Estimate(0.0, np.zeros((2, 4)))


def test_rows_of_a_table_are_of_their_domain_and_number_of_steps():
    made = [predicted(place, score, domain=domain, multi_step=multi_step) for place, (domain, multi_step, score) in enumerate(
        (domain, multi_step, score) for domain, scores in (("scenes", (1.0, 0.0)), ("charts", (0.5, 0.25)))
        for multi_step, score in zip((False, True), scores, strict=True)
    )]  # fmt: skip
    lines = [line.split("|")[1:4:2] for line in tables.accuracy_table({"model": made}).splitlines()[2:]]
    found = [(name.strip(), value.split("±")[0].strip()) for name, value in lines]
    assert found[:6] == [
        ("scenes", "50.0"), ("- single-step", "100.0"), ("- multi-step", "0.0"),
        ("charts", "37.5"), ("- single-step", "50.0"), ("- multi-step", "25.0"),
    ]  # fmt: skip
    assert found[6:] == [("all", "43.8"), ("- single-step", "75.0"), ("- multi-step", "12.5")]


def test_lengths_have_their_quantiles():
    outputs = [f"<think>{'a ' * length}</think><answer>b</answer>" for length in range(101)]
    found = METRICS["cot_length"].compute(outputs)
    assert [found[name] for name in ("min", "p10", "median", "p90", "max")] == [0, 10, 50, 90, 100]
    assert found["std"] == pytest.approx(np.arange(101).std()) and found["without"] == pytest.approx(1 / 101)


def test_half_right_is_right_and_less_is_not():
    (item,) = held_out_items(5)[:1]
    golds = ("tea",) * 2 + ("cup",) * 3 + ("milk",) * 5
    asked = replace(item, metric="vqa", golds=golds)
    for answer, score, correct in (("tea", 0.6, True), ("cup", 0.9, True), ("water", 0.0, False)):
        made = kept.judge(asked, answer)
        assert (made.score, made.correct) == (pytest.approx(score), correct)
    made = kept.judge(replace(asked, golds=("tea",) + ("milk",) * 9), "tea")
    assert made.score == pytest.approx(0.3) and not made.correct and made.scored


def test_an_answer_that_is_no_number_is_not_right_where_one_is_asked_for():
    assert not is_correct("cat", "cat", kind="number") and is_correct("cat", "cat")
    assert is_correct("7 cats", "7", kind="number") and not is_correct("perhaps", "perhaps", kind="yes_no")


def test_a_step_with_other_numbers_is_another_step():
    reference = "<think>so the price of the tea is 4 in all. then the sum of them is 11</think><answer>11</answer>"
    row = METRICS["step_score"].score(reference.replace("4", "5"), reference)
    assert (row["found"], row["in_order"]) == (0.5, 1.0)
    assert METRICS["step_score"].score(reference, reference)["found"] == 1


def test_scales_and_bounds_of_numbers_are_read():
    assert number_in("3 thousand") == (3000.0, "") and number_in("2.5 million") == (2.5e6, "")
    assert false_statements("3 <= 3. 3 >= 3. 2 ≤ 3") == [] and len(false_statements("4 <= 3. 3 >= 4. 3 < 3")) == 3


def test_the_gallery_has_the_longest_and_lengths_of_scored_outputs(tmp_path, monkeypatch):
    items = held_out_items(10)[:10]
    made = [kept.judge(item, f"<think>{'a ' * place}</think><answer>x</answer>") for place, item in enumerate(items)]
    shown = report.select(items, [{"model": prediction} for prediction in made], 4)
    assert items[9] in shown and items[8] in shown  # beside the first
    lengths = []
    monkeypatch.setattr(report, "length_plot", lambda given: lengths.append(given) or "")
    made[3] = replace(made[3], fault=kept.IMAGE)
    report.write_report(tmp_path / "page.html", items, {"model": made})
    assert lengths == [{"model": [prediction.length for prediction in made if prediction.scored]}]
    assert len(lengths[0]["model"]) == 9


def test_outputs_come_in_the_order_of_the_prompts(monkeypatch):
    monkeypatch.setattr(generation, "rendered", lambda processor, prompt, options: prompt)
    said = lambda model, processor, texts, images, **options: [generation.Completion(f"{text}, {len(shown)}", False) for text, shown in zip(texts, images, strict=True)]  # fmt: skip  # noqa: E731
    monkeypatch.setattr(generation, "complete", said)
    prompts, images = ["cccc", "a", "bbb", "dd", "e"], [[1], [], [1, 1], [1], []]
    made = generation.generate_texts(None, None, prompts, images, batch_size=2)
    assert made == ["cccc, 1", "a, 0", "bbb, 2", "dd, 1", "e, 0"]


def test_about_is_within_a_twentieth():
    assert false_statements("7 / 3 ≈ 2.4") == [] and len(false_statements("7 / 3 ≈ 2.6")) == 1
