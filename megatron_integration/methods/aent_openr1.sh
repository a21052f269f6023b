# shellcheck shell=bash disable=SC2034
# AEnt with the numbers of its OpenR1 run (Shen, arXiv 2509.03493), which were found for a distilled model of 1.5 billion
# parameters.
METHOD_ARGS=(
    "control=[aent]" loss.clip_low=0.2 loss.clip_high=0.2
    controls.aent.entropy_coef=3.0e-4 controls.aent.clamp_p=0.25
    controls.aent.entropy_low=0.35 controls.aent.entropy_high=0.62
    controls.aent.coef_lr=1.0e-4 controls.aent.coef_min=4.0e-5 controls.aent.coef_max=1.0e-3
    controls.aent.warmup=156
)
