r"""
SiQ-VL as a model of the harness lmms-eval, and the drawn questions as one of its tasks; a plugin, nothing to install.

    pip install -r requirements-lmms-eval.txt
    export LMMS_EVAL_PLUGINS=siq_vl.evaluation.lmms
    python -m lmms_eval --model siq_vl --model_args pretrained=outputs/siq-vl-0.5b/stage3 --tasks mme --batch_size 16

Tasks by name: `mme`, `pope`, `mmvet`, `mmstar`, `chartqa`, `textvqa_val`, `scienceqa_img`, `ocrbench`. They fetch their
data from the Hub; `mmvet` also asks a judge model for its marks. Offline, with drawn data:

    python -m siq_vl.evaluation.lmms.task_data outputs/lmms/figures.parquet --count 100
    python -m lmms_eval --include_path siq_vl/evaluation/lmms/tasks --tasks siq_vl_figures --batch_size 16 \
        --model siq_vl --model_args pretrained=outputs/tiny/stage3

(The harness lists a plugin's tasks only after it has looked for those asked for, hence the path.) Answers are equal to
those of `evaluate_vqa.py`: the harness gets the answer alone, or the whole output with `keep_rationale=True` in
`--model_args`; `enable_thinking=False` asks for answers without reasoning.
"""
