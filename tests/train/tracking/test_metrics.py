"""MFU is counted against the published figure of that very card, or not at all."""

from train.tracking.metrics import named_peak

# Names as the driver gives them. Figures: dense bf16 TFLOP/s of NVIDIA's data sheets, half of those "with sparsity".
PUBLISHED = {
    "NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA GH200 480GB": 989, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 NVL": 835, "NVIDIA H100 PCIe": 756, "NVIDIA H20": 148,
    "NVIDIA H20-3e": 148, "NVIDIA L40S": 362, "NVIDIA L40": 181, "NVIDIA L4": 121, "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A40": 150, "NVIDIA A30": 165,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA RTX 6000 Ada Generation": 364, "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 3090": 71, "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112, "Tesla V100S-PCIE-32GB": 130, "Tesla T4": 65,
}  # fmt: skip
UNKNOWN = [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "Quadro RTX 6000",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA T400",
    "",
]


def test_a_card_is_measured_by_its_own_figure():
    assert {name: named_peak(name) for name in PUBLISHED} == {name: 1e12 * peak for name, peak in PUBLISHED.items()}
    assert [name for name in UNKNOWN if named_peak(name)] == []
