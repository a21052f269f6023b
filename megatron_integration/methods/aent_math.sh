# shellcheck shell=bash disable=SC2034
# AEnt with the numbers of its MATH run (Shen, arXiv 2509.03493), which were found for 1.5 billion parameters: a band of 0.15
# to 0.24 nats may not suit another model. Watch actor/entropy before the 30 steps of warm-up end.
METHOD_ARGS=(
    "control=[aent]" loss.clip_low=0.2 loss.clip_high=0.2
    controls.aent.entropy_coef=2.0e-3 controls.aent.clamp_p=0.33
    controls.aent.entropy_low=0.15 controls.aent.entropy_high=0.24
    controls.aent.coef_lr=2.0e-3 controls.aent.coef_min=6.0e-4 controls.aent.coef_max=9.0e-3
    controls.aent.warmup=30
)
