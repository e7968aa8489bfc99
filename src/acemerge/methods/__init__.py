"""The rules by name. Adding one is a class in a file of its family and one line here."""

from __future__ import annotations

from acemerge.methods.ace import Ace
from acemerge.methods.ace_auto import AceAuto
from acemerge.methods.actmat import Actmat, Tact
from acemerge.methods.anchored import Anchored
from acemerge.methods.base import (
    Calibration,
    Layer,
    LayerResult,
    Method,
    Needs,
    Together,
    check_experts,
    check_weights,
    expert_seeds,
)
from acemerge.methods.calibrated import Fisher, RegMean, RegMeanPp
from acemerge.methods.common_bases import CoreSpace, Knots
from acemerge.methods.elementwise import Average, TaskArithmetic
from acemerge.methods.factors import LowRankResult, keeps_low_rank, merge_low_rank
from acemerge.methods.fusion import ArceeFusion
from acemerge.methods.kron import Kron
from acemerge.methods.kron_auto import KronAuto
from acemerge.methods.masks import Consensus, Emr
from acemerge.methods.mergekit_overlap import MergekitNearswap, MergekitRam
from acemerge.methods.mergekit_sum import MergekitSum
from acemerge.methods.mergekit_variants import MergekitLinear, MergekitMultislerp, MergekitSce, MergekitSlerp
from acemerge.methods.registry import (
    DEFAULT,
    METHODS,
    AnyMethod,
    as_rule,
    as_table,
    load_installed,
    make,
    register,
    rule_class,
    rule_name,
)
from acemerge.methods.sparse import Breadcrumbs, DareLinear, DareTies, Della, Ties
from acemerge.methods.spectral import Cart, IsoC, IsoCts, TsvM
from acemerge.methods.sphere import Karcher, ModelStock, Slerp
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.methods.svc import Svc
from acemerge.methods.trust import Trust
from acemerge.methods.wudi import SwudiA, Wudi

__all__ = [
    "DEFAULT",
    "METHODS",
    "AnyMethod",
    "Calibration",
    "Layer",
    "LayerResult",
    "LayerStats",
    "LowRankResult",
    "Method",
    "Needs",
    "Status",
    "Together",
    "as_rule",
    "as_table",
    "check_experts",
    "check_weights",
    "expert_seeds",
    "keeps_low_rank",
    "load_installed",
    "make",
    "merge_low_rank",
    "register",
    "rule_class",
    "rule_name",
]

for _rule in (
    Average,
    TaskArithmetic,
    Ties,
    DareLinear,
    DareTies,
    Della,
    Breadcrumbs,
    Consensus,
    Emr,
    Slerp,
    ModelStock,
    Karcher,
    Cart,
    TsvM,
    IsoC,
    IsoCts,
    Svc,
    Knots,
    CoreSpace,
    Ace,
    AceAuto,
    Anchored,
    Kron,
    KronAuto,
    Actmat,
    Tact,
    Wudi,
    SwudiA,
    RegMean,
    RegMeanPp,
    Fisher,
    MergekitLinear,
    MergekitSum,
    MergekitSlerp,
    MergekitMultislerp,
    MergekitSce,
    MergekitNearswap,
    MergekitRam,
    ArceeFusion,
    Trust,
):
    register(_rule)
