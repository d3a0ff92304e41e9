"""Every benchmark: what it measures, the command that runs it again, its stored results and what is rendered from them.

A new benchmark is one file here, which measures and makes its table, and one entry of `CASES`. `render.py` makes the
blocks `<!-- render:NAME -->` of the Markdown files and the table of benchmarks/README.md from these entries.
"""

from functools import partial

import archive_tables
import busy_plan
import classes
import clients
import compatibility
import decoding
import end_to_end
import fidelity_tables
import frontier
import fuzz
import gpu_bars
import kernel_profile
import lm_eval_decoder
import oracle_mass
import real_weights_tables
import reliability
import ruler_tables
import scaling_model
import short_queries
import smollm2_tables
import tables
import ulysses
import vision_tables
from case import Block, Case, block_of
from values import OPERATORS

#: Settings of one table in README.
RULER_HALF = ("ruler_grid_4096.json", "ruler_grid_long.json", "ruler_clusters.json", "ruler_clusters_16384.json")
#: Its needle tasks alone, counted from answers of the same runs.
RULER_PART = "ruler_grid_safe_16384.json"
#: Of the operator with clusters, the latest last.
GPU_CLUSTERS = tuple(f"{name}.json" for name in OPERATORS["clusters"])
#: Libraries that take the same shapes.
PEERS = ("gpu_peers_h200.json", "gpu_peers_64_h200.json")
CAPTURE = "needle-18m.safetensors"  # of `baatt analyze capture`
#: How the needles and ablations of the first checkpoint are asked today; what ran then is stored in their results.
ABLATION = (
    "baatt evaluate ruler --preset paper --lengths 4096 --count 500 --json FILE --tasks niah_multikey_2,niah_multivalue"
)

CASES: dict[str, Case] = {
    "cpu_operator": Case(
        "the operator on a processor beside PyTorch's dense attention: time, memory, error",
        "baatt bench --device cpu --threads 2 --shape 1x8x8192x64 --sparsity 0.5,0.75,0.875 --against dense "
        "--json FILE, and the same with --preset paper",
        ("cpu_clusters.json", "cpu_paper.json"),
        {"cpu_operator": tables.cpu_operator},
    ),
    "busy_plan": Case(
        "plans on a processor beside busy processes",
        "python benchmarks/busy_plan.py --json FILE",
        ("busy_plan.json",),
        {"busy_plan": busy_plan.table},
    ),
    "gpu_bars": Case(
        "operator and attention kernel on a GPU beside cuDNN, FlashAttention and FlexAttention",
        "python benchmarks/gpu_bars.py --json FILE",
        ("gpu_operator_h200.json",),
        {
            "gpu_operator": gpu_bars.operator_table,
            "gpu_kernel": gpu_bars.kernel_table,
            "gpu_compensation": gpu_bars.compensation_table,
        },
    ),
    "gpu_clusters": Case(
        "the operator with blocks chosen by clusters beside the paper's setting, cuDNN and FlashAttention on a GPU",
        "python benchmarks/gpu_bars.py --no-flex --cases NAMES --json FILE",
        GPU_CLUSTERS,  # the latest row of a case is shown
        {"gpu_clusters": Block(gpu_bars.clusters_table, together=True)},
    ),
    "gpu_causal": Case(
        "causal and block-causal attention beside causal cuDNN and FlashAttention on a GPU",
        "python benchmarks/gpu_bars.py --no-flex --cases NAMES --json FILE",
        ("gpu_causal_h200.json",),
        {"gpu_causal": gpu_bars.causal_table},
    ),
    "end_to_end": Case(
        "whole models in their published sizes on a GPU, dense and sparse: passes, prompts, answers, denoising steps",
        "python benchmarks/end_to_end.py --json FILE",
        tuple(
            f"end_to_end{part}_h200.json" for part in ("", "_more", "_rest", "_wan", "_again", "_answer_8K")
        ),  # the latest row of a case is shown
        {"end_to_end": Block(end_to_end.table, together=True)},
    ),
    "gpu_sweep": Case(
        "the operator over lengths, drawn as docs/figures/gpu_sweep_h200.png",
        "baatt bench --preset paper --sweep --against cudnn,flash --json FILE --plot PICTURE",
        ("gpu_sweep_h200.json",),
    ),
    "gpu_peers": Case(
        "the attention kernel on a GPU beside the block-sparse attention of other libraries",
        "baatt bench --what kernel --against fa4,fa4-dense,cudnn-bsa,cudnn --shape SHAPES --json FILE",
        (*PEERS, "gpu_peers_flashinfer_h200.json"),
        {
            "gpu_peers": Block(gpu_bars.peers_table, PEERS, together=True),
            "gpu_peers_flashinfer": Block(gpu_bars.peers_table, ("gpu_peers_flashinfer_h200.json",), together=True),
        },
    ),
    "kernel_profile": Case(
        "the kernels under the counters of Nsight Compute: its main numbers, and what it printed",
        "python benchmarks/kernel_profile.py --out FILE",
        ("kernel_profile_h200.json", "kernel_profile_h200.txt"),
        {"kernel_profile": Block(kernel_profile.table, ("kernel_profile_h200.json",))},
    ),
    "gpu_choosers": Case(
        "the whole operator on a GPU beside XAttention's choice of blocks and other libraries' attention over it",
        "baatt bench --against xattention,xattention-fa4,xattention-cudnn-bsa,cudnn --shape SHAPES --json FILE",
        ("gpu_choosers_h200.json",),
        {"gpu_choosers": gpu_bars.choosers_table},
    ),
    "reliability": Case(
        "named checks of the operator: threads, streams, graphs, memory, sizes, shapes under torch.compile",
        "python benchmarks/reliability.py --json FILE",
        ("reliability_h200.json", "reliability_fork_h200.json"),
        {"reliability": Block(reliability.table, together=True)},
    ),
    "fuzz": Case(
        "random calls of the GPU implementations against attention in float64 over the same plan",
        "python benchmarks/fuzz.py --device cuda --impl triton hopper --count 10000 --processes 15 --json FILE",
        ("fuzz_h200.json", "fuzz_more_h200.json"),
        {"fuzz": fuzz.table},
    ),
    "sanitizer": Case(
        "every kernel under the tools of compute-sanitizer, on small shapes: what they printed",
        "bash benchmarks/sanitize.sh FOLDER",
        tuple(f"sanitizer_{tool}.txt" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
    ),
    "gpu_tests": Case(
        "the tests that need a GPU: what pytest printed",
        "python -m pytest -m gpu tests/gpu",
        ("gpu_tests_h200.txt",),
    ),
    "frontier": Case(
        "RULER's averages beside the time of the operator, drawn as docs/figures/frontier_h200.png",
        "python benchmarks/frontier.py --json FILE",
        ("frontier_h200.json",),
        {
            "frontier": Block(frontier.table, ("frontier_h200.json", *ruler_tables.GRIDS), together=True),
            "which_sparsity": Block(
                frontier.which,
                ("frontier_h200.json", *GPU_CLUSTERS, "fidelity_smollm2.json", *ruler_tables.GRIDS),
                together=True,
            ),
        },
    ),
    "short_queries": Case(
        "few queries over many keys: from how many on a sparse call is faster",
        "python benchmarks/short_queries.py --json FILE",
        ("short_queries_h200.json", "short_queries_cpu.json"),
        {
            "short_queries": Block(short_queries.table, ("short_queries_h200.json",)),
            "short_queries_cpu": Block(short_queries.table, ("short_queries_cpu.json",)),
        },
    ),
    "oracle_mass": Case(
        "the kernel of the exact block masses beside the eager function",
        "python benchmarks/oracle_mass.py --json FILE",
        ("oracle_mass.json",),
        {"oracle_mass": oracle_mass.table},
    ),
    "fidelity": Case(
        "what sparse attention costs on a real pretrained model, every layer sparse: scores, a profile of layers, "
        "drawn as docs/figures/fidelity_smollm2.png",
        "bash benchmarks/fidelity.sh FOLDER",
        ("fidelity_smollm2.json", "fidelity_profile.json", "fidelity_layers.json", "fidelity_profile.policy.json"),
        {
            "fidelity": Block(fidelity_tables.by_score, ("fidelity_smollm2.json",)),
            "fidelity_bars": Block(
                fidelity_tables.bars, ("fidelity_smollm2.json", "fidelity_profile.json"), together=True
            ),
            "fidelity_profile": Block(fidelity_tables.profile, ("fidelity_profile.json",)),
            "fidelity_layers": Block(fidelity_tables.layers, ("fidelity_layers.json",)),
        },
    ),
    "fidelity_first": Case(
        "the first key block kept and free on a real pretrained model, causal",
        "baatt evaluate fidelity --model FOLDER --gguf NAME --lengths 4K --documents 4 --needles 8 --sparsity 0.7,0.9 "
        "--score clusters,exact --keep-first 0",
        ("fidelity_first_0.json", "fidelity_first_1.json"),
        {"fidelity_first": Block(fidelity_tables.by_first, together=True)},
    ),
    "real_weights": Case(
        "scores on a real pretrained model, every layer sparse: KL to the dense model and planted numbers found",
        "bash benchmarks/fidelity.sh FOLDER",
        ("real_weights_smollm2.json",),
        {
            "real_weights": real_weights_tables.table,
            "real_weights_bars": real_weights_tables.bars_table,
            "real_weights_beta": real_weights_tables.beta_table,
        },
    ),
    "lm_eval_decoder": Case(
        "RULER's needles in lm-evaluation-harness on a real pretrained decoder, its model `hf` with `enable` around it",
        "python benchmarks/lm_eval_decoder.py --model FOLDER --gguf NAME --json FILE",
        ("lm_eval_decoder.json",),
        {"lm_eval_decoder": lm_eval_decoder.table},
    ),
    "ulysses": Case(
        "Ulysses attention over several GPUs beside one",
        "torchrun --nproc-per-node 2 benchmarks/ulysses.py --json FILE",
        ("ulysses_gpu.json",),
        {"ulysses": ulysses.table},
    ),
    "scaling_model": Case(
        "a model, not a measurement, of Ulysses attention on up to 64 GPUs",
        "python benchmarks/scaling_model.py --node-bandwidth 2.7e11",
        ("ulysses_scaling.json",),
        {"ulysses_scaling": scaling_model.table},
    ),
    "clients": Case(
        "causal, block-causal and bidirectional models under their own loops: what is sparse, and what is not and why",
        "python benchmarks/clients.py --json FILE",
        ("clients.json",),
        {"clients": clients.table},
    ),
    "classes": Case(
        "every transformer class that diffusers exports, and every architecture of transformers' AutoModel: what is "
        "sparse, and what is not and why",
        "python benchmarks/classes.py --library diffusers --json FILE",
        ("classes_diffusers.json", "classes_transformers.json"),
        {
            f"classes_{library}": Block(partial(classes.table, library=library), (f"classes_{library}.json",))
            for library in classes.ROOMS
        },
    ),
    "compatibility": Case(
        "tests of the integrations beside several versions of the libraries",
        "python benchmarks/compatibility.py --json FILE",
        ("compatibility.json",),
        {"compatibility": compatibility.table},
    ),
    "bound": Case(
        "the error bound beside the true deviation of the logits, layer by layer",
        f"baatt analyze bound {CAPTURE} --preset paper --sort none,q,k,qk --json FILE --plot PICTURE",
        ("bound_needle-18m.json",),
        {"bound": tables.bound_by_layer},
    ),
    "recall": Case(
        "attention mass kept by each score beside the oracle, at equal budgets",
        f"baatt analyze recall {CAPTURE} --preset paper --sort none,q,k,qk --json FILE --plot PICTURE",
        ("recall_needle-18m.json",),
        {"recall": tables.recall_by_score},
    ),
    "recall_beta": Case(
        "attention mass kept by the covariance score, by the weight of its compensation",
        f"baatt analyze recall {CAPTURE} --preset paper --sort none,qk --beta 0,0.1,0.5,1,2 --scores covariance "
        "--json FILE",
        ("recall_beta_needle-18m.json",),
        {"recall_beta": tables.recall_by_beta},
    ),
    "layers": Case(
        "what an order of the tokens does to each layer",
        f"baatt analyze layers {CAPTURE} --sort none,k,qk --segment 256,1024 --json FILE",
        ("layers_needle-18m.json",),
        {"layers": tables.sorting_by_layer},
    ),
    "keys": Case(
        "what single keys get: sinks, and what norms say",
        f"baatt analyze keys {CAPTURE} --json FILE",
        ("keys_needle-18m.json",),
        {"keys": tables.keys_by_layer},
    ),
    "smollm2_studies": Case(
        "attention of the diffusion model grown from SmolLM2, layer by layer: sinks and norms, the error bound, "
        "what sorting does, attention mass kept",
        "bash benchmarks/smollm2.sh studies MODEL WORK RESULTS",
        tuple(f"{name}_smollm2.json" for name in ("keys", "bound", "layers", "recall", "recall_first", "recall_beta")),
        {
            "smollm2_keys": Block(tables.keys_by_layer, ("keys_smollm2.json",)),
            "smollm2_bound": Block(tables.bound_by_layer, ("bound_smollm2.json",)),
            "smollm2_layers": Block(tables.sorting_by_layer, ("layers_smollm2.json",)),
            "smollm2_recall": Block(tables.recall_by_score, ("recall_smollm2.json",)),
            "smollm2_recall_first": Block(tables.recall_by_score, ("recall_first_smollm2.json",)),
            "smollm2_recall_beta": Block(tables.recall_by_beta, ("recall_beta_smollm2.json",)),
        },
    ),
    "ruler": Case(
        "RULER's eleven offline tasks with dense attention",
        "baatt evaluate ruler --device cuda --tasks all --count 200 --block-length 8 --remasking left_to_right "
        "--cache dual --lengths 4096,8192,16384 --sparsity 0 --json FILE",
        ("ruler_needle-18m.json",),
        {"ruler": ruler_tables.by_length},
    ),
    "ruler_grid": Case(
        "RULER's eleven offline tasks with several ways to choose blocks",
        "python benchmarks/ruler_grid.py FOLDER --gpus 8",
        (*ruler_tables.GRIDS, RULER_PART),
        {
            "ruler_half": Block(ruler_tables.half_by_length, RULER_HALF, together=True),
            "ruler_averages": Block(ruler_tables.grid_averages, ruler_tables.GRIDS, together=True),
            "ruler_bars": Block(ruler_tables.bars_of_clusters, ruler_tables.GRIDS, together=True),
            "ruler_part": Block(ruler_tables.grid_averages, (RULER_PART,), together=True),
            "ruler_tasks": ruler_tables.grid_tasks,
        },
    ),
    "ruler_ablations": Case(
        "RULER's hard tasks with one option of the clusters changed at a time",
        "python benchmarks/ruler_grid.py FOLDER --settings dense,ablations --tasks niah_multivalue,vt,cwe "
        "--lengths 4096 --sparsity 0.9 --count 100 --gpus 4",
        ("ruler_ablations.json",),
        {"ruler_ablations": ruler_tables.ablations},
    ),
    "demo": Case(
        "dense attention and keys sorted in segments of 256, on twenty samples of the demo's task, on a processor",
        "python training/evaluate.py --tasks niah_multikey_1 --lengths 4096 --count 20 --device cpu --dtype float32 "
        "--settings sort=k,segment=256,score=covariance,keep_first=0,dense_layers=0+1 dense --json FILE",
        ("needles_sparse_cpu.json",),
        {"demo_settings": archive_tables.needles_by_setting},
    ),
    "decoding": Case(
        "tokens per second and right answers of decoding, by cache, attention and threshold",
        "python benchmarks/decoding.py --json FILE",
        ("decoding_h200.json",),
        {"decoding": decoding.table},
    ),
    "ablation_beta": Case(
        "needle answers by the weight of the compensation",
        f"{ABLATION},niah_multikey_3 --dial beta=0,0.1,0.5,1,2 --dial sparsity=0.3,0.5,0.7 --dial sort=none,qk",
        ("ablation_beta_h200.json",),
        {
            "ablation_beta": archive_tables.by_beta,
            "ablation_beta_tasks": partial(archive_tables.by_beta, by_task=True),
        },
    ),
    "ablation_sort": Case(
        "needle answers by order and segment",
        f"{ABLATION} --dial sort=none,q,k,qk --dial segment=256,1024,4096 --dial sparsity=0.5,0.7,0.9",
        ("ablation_sort_h200.json",),
        {
            "ablation_sort": archive_tables.by_order,
            "ablation_sort_tasks": partial(archive_tables.by_order, by_task=True),
        },
    ),
    "ablation_score": Case(
        "needle answers by score",
        f"{ABLATION} --dial sort=none,qk --dial score="
        "covariance,mean,antidiagonal-8,antidiagonal-16,window,random,oracle",
        ("ablation_score_h200.json",),
        {"ablation_score": archive_tables.by_score},
    ),
    "needles_dense": Case(
        "needle answers of dense attention by length",
        "baatt evaluate ruler --tasks needles --lengths 512,1024,2048,4096 --sparsity 0 --json FILE",
        ("needles_dense_h200.json",),
        {"needles_dense_h200": archive_tables.needles_by_length},
    ),
    "needles_sparse": Case(
        "needle answers by order, segment and dense layers",
        "baatt evaluate ruler --preset paper --tasks needles --lengths 4096 --dial sort=none,k,qk "
        "--dial segment=256,1024 --json FILE",
        ("needles_sparse_h200.json", "needles_layers_h200.json"),
        {
            "needles_sparse_h200": Block(archive_tables.needles_by_task, ("needles_sparse_h200.json",)),
            "needles_totals": Block(archive_tables.needles_totals, ("needles_sparse_h200.json",)),
            "needles_layers": Block(archive_tables.needles_totals, ("needles_layers_h200.json",)),
        },
    ),
    "training": Case(
        "histories of the shipped model's training, and the sources of its text",
        "bash training/run.sh",
        (
            "training/run1.jsonl",
            *(f"training/run{number}.json" for number in range(2, 9)),
            *(f"training/{trial}.json" for trial in ("understanding_evenly", "video_32_scenes")),
            "training/sources.json",
            "training/trial_all_tasks.txt",
        ),
    ),
    "needle_8bit": Case(
        "RULER's tasks of needle-18m with weights of 8 bits, dense",
        "baatt evaluate ruler --device cuda --dtype bfloat16 --tasks all --count 200 --block-length 8 --remasking "
        "left_to_right --cache dual --lengths 4096,8192 --sparsity 0 --json FILE",
        ("ruler_needle-18m_8bit.json",),
        {"ruler_8bit": ruler_tables.by_length},
    ),
    **smollm2_tables.CASES,
    **vision_tables.CASES,
}


def list_cases(cases: dict[str, Case]) -> str:
    """The list of benchmarks/README.md."""
    return "\n".join(
        f"- **{name}**: {case.measures}.  \n  `{case.command}`  \n"
        f"  Results: {', '.join(f'`{result}`' for result in case.results)}."
        for name, case in cases.items()
    )


def make_blocks(cases: dict[str, Case]) -> dict[str, Block]:
    """All blocks by name: those of the cases, and their list."""
    blocks = {name: block_of(case, block) for case in cases.values() for name, block in case.blocks.items()}
    return blocks | {"cases": Block(partial(list_cases, cases))}


BLOCKS = make_blocks(CASES)
