"""Diagnostics and interventions on attention: one hook interface, and statistics on what it observes."""

from jattn.probes.attention import attention
from jattn.probes.attention_entropy import attention_entropy
from jattn.probes.capture import capture, for_layers
from jattn.probes.composing import compose
from jattn.probes.dsf import Dsf, dsf_matrix, dsf_scan, taylor_features, to_dsf
from jattn.probes.dsf_summary import DsfSummary, dsf_summary
from jattn.probes.hook import INPUTS, OBSERVABLE, AttnHook, Reweight, per_query_head, redistribute, renormalize
from jattn.probes.induction_score import induction_rows, induction_score
from jattn.probes.kept_mass import kept_mass, kept_mass_of_lse
from jattn.probes.plots import plot_attention, plot_heads, plot_layers
from jattn.probes.sink_rate import column_counts, sink_rate
from jattn.probes.summary import heads_summary, residual_norms, sink_mass, top_heads, weights_by_rows

__all__ = [
    "INPUTS",
    "OBSERVABLE",
    "AttnHook",
    "Dsf",
    "DsfSummary",
    "Reweight",
    "attention",
    "attention_entropy",
    "capture",
    "column_counts",
    "compose",
    "dsf_matrix",
    "dsf_scan",
    "dsf_summary",
    "for_layers",
    "heads_summary",
    "induction_rows",
    "induction_score",
    "kept_mass",
    "kept_mass_of_lse",
    "per_query_head",
    "plot_attention",
    "plot_heads",
    "plot_layers",
    "redistribute",
    "renormalize",
    "residual_norms",
    "sink_mass",
    "sink_rate",
    "taylor_features",
    "to_dsf",
    "top_heads",
    "weights_by_rows",
]
