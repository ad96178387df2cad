"""What is cited, and where: papers with an arXiv id by the modules whose text names it, older sources by name and year."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("theory", "estimators", "optimizers", "experiments")
ARXIV = r"\b\d{4}\.\d{5}\b"

TITLES = {
    "1706.08840": "Gradient Episodic Memory for Continual Learning",
    "1801.10112": "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
    "1804.04235": "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    "1812.06162": "An Empirical Model of Large-Batch Training",
    "1905.13727": "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
    "1907.11692": "RoBERTa: A Robustly Optimized BERT Pretraining Approach",
    "1910.02054": "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    "2006.09142": "Cogradient Descent for Bilinear Optimization",
    "2007.10412": "Randomized Automatic Differentiation",
    "2012.15723": "Making Pre-trained Language Models Better Few-shot Learners",
    "2102.08098": "GradInit: Learning to Initialize Neural Networks for Stable and Efficient Training",
    "2103.09762": "Gradient Projection Memory for Continual Learning",
    "2106.09685": "LoRA: Low-Rank Adaptation of Large Language Models",
    "2106.05203": "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback",
    "2110.02861": "8-bit Optimizers via Block-wise Quantization",
    "2203.15556": "Training Compute-Optimal Large Language Models",
    "2302.13971": "LLaMA: Open and Efficient Foundation Language Models",
    "2305.13245": "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    "2305.15265": "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
    "2305.17333": "Fine-Tuning Language Models with Just Forward Passes",
    "2306.09782": "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
    "2307.05695": "ReLoRA: High-Rank Training Through Low-Rank Updates",
    "2308.03303": "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    "2310.10195": "AdaLomo: Low-memory Optimization with Adaptive Learning Rate",
    "2402.12865": "Backward Lens: Projecting Language Model Gradients into the Vocabulary Space",
    "2402.03293": "Flora: Low-Rank Adapters Are Secretly Gradient Compressors",
    "2403.03507": "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    "2403.17919": "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    "2404.02827": "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    "2405.17991": "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections",
    "2405.18380": "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning",
    "2406.17660": "Grass: Compute Efficient Low-Memory LLM Training with Structured Sparse Gradients",
    "2407.11239": "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    "2407.08296": "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
    "2408.12857": "Memory-Efficient LLM Training with Online Subspace Descent",
    "2410.01623": "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    "2410.07698": "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
    "2410.08989": "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces",
    "2410.11289": "Subspace Optimization for Large Language Models with Convergence Guarantees",
    "2410.15352": "CompAct: Compressed Activations for Memory-Efficient LLM Training",
    "2410.16103": "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
    "2411.07837": "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    "2412.00071": "COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection",
    "2412.02153": "Revisiting the Initial Steps in Adaptive Gradient Descent Optimization",
    "2412.05270": "APOLLO: SGD-like Memory, AdamW-level Performance",
    "2412.19616": "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training",
    "2502.07222": "A Memory Efficient Randomized Subspace Optimization Method for Training Large Language Models",
    "2502.16982": "Muon is Scalable for LLM Training",
    "2504.05295": "Dion: Distributed Orthonormalized Updates",
    "2505.09647": "On Unbiased Low-Rank Approximation with Minimum Distortion",
    "2505.17967": "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    "2505.18313": "PLUMAGE: Probabilistic Low rank Unbiased Min Variance Gradient Estimator for Efficient Large Model Training",
    "2507.02503": "Continual Gradient Low-Rank Projection Fine-Tuning for LLMs",
    "2507.08091": "Low-rank Momentum Factorization for Memory Efficient Training",
    "2510.17802": "Unbiased Gradient Low-Rank Projection",
    "2510.22467": "Backward-Friendly Optimization: Training Large Language Models with Approximate Gradients under Memory Constraints",
    "2512.07112": "FOAM: Blocked State Folding for Memory-Efficient LLM Training",
    "2602.07712": "Towards Robust Scaling Laws for Optimizers",
    "2603.20632": "Optimal low-rank stochastic gradient estimation for LLM training",
}
OLDER = {  # as modules name them
    "Achlioptas (2003)": "Database-friendly random projections",
    "Ailon & Chazelle (2006)": "Approximate nearest neighbors and the fast Johnson–Lindenstrauss transform",
    "Deville & Tillé (1998)": "Unequal probability sampling without replacement through a splitting method",
    "Fino & Algazi (1976)": "Unified matrix treatment of the fast Walsh–Hadamard transform",
    "Isserlis (1918)": "On a formula for the product-moment coefficient of any order of a normal frequency distribution",
    "Drineas, Kannan & Mahoney (2006)": "Fast Monte Carlo algorithms for matrices I: approximating matrix multiplication",
    "Madow (1949)": "On the theory of systematic sampling, II",
    "Makhoul (1980)": "A fast cosine transform in one and two dimensions",
    "Mezzadri (2007)": "How to generate random matrices from the classical compact groups",
    "Patarasuk and Yuan (2009)": "Bandwidth optimal all-reduce algorithms for clusters of workstations",
    "Roy & Vetterli (2007)": "The effective rank: a measure of effective dimensionality",
    "Seide et al. (2014)": "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech DNNs",
    "Thakur, Rabenseifner & Gropp (2005)": "Optimization of collective communication operations in MPICH",
    "Tropp (2011)": "Improved analysis of the subsampled randomized Hadamard transform",
    "Yates (1937)": "The design and analysis of factorial experiments",
}


@cache
def sources() -> dict[str, str]:
    """Path from the root → text, of every module that may cite; not of those of this folder, which list."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if path.parent != Path(__file__).parent]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def cited() -> dict[str, list[str]]:
    """arXiv id → modules that name it.

    >>> cited()["2403.17919"]
    ['optimizers/lisa.py']
    """
    found: dict[str, list[str]] = {}
    for path, text in sources().items():
        for number in sorted(set(re.findall(ARXIV, text))):
            found.setdefault(number, []).append(path)
    return dict(sorted(found.items()))


def linked(number: str) -> str:
    """An arXiv id as a link; nothing for none."""
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def markdown() -> str:
    """All papers by id, then the older sources; each with the modules that it went into."""
    files = lambda paths: ", ".join(f"[`{path}`](../{path})" for path in paths)  # noqa: E731
    lines = ["| arXiv | title | where |", "|---|---|---|"]
    lines += [f"| {linked(number)} | {TITLES.get(number, '')} | {files(paths)} |" for number, paths in cited().items()]
    lines += ["", "| source | title | where |", "|---|---|---|"]
    lines += [f"| {name} | {title} | {files(path for path, text in sources().items() if name in text)} |" for name, title in OLDER.items()]
    return "\n".join(lines)
