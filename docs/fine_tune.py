"""Fine-tunes an encoder on labeled images, with datasets and transformers alone.

    python docs/fine_tune.py runs/quickstart/encoder ./my_images
    python docs/fine_tune.py ENCODER DATASET --output my_classifier --epochs 20

ENCODER is a folder or a Hub id; DATASET a Hub id or a folder with `train` and `test` splits, say one subfolder for
each class. The result loads with `pipeline("image-classification", "my_classifier")`.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from datasets import load_dataset
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

import hf_ssl_or  # noqa: F401  (tells the Auto classes about the encoders)


def main() -> None:
    """Trains, prints the accuracy as JSON, and saves the classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("dataset")
    parser.add_argument("--output", default="fine_tuned")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)  # the new head is drawn before Trainer sets its seed
    dataset = load_dataset(options.dataset)
    names = dataset["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.encoder)
    model = AutoModelForImageClassification.from_pretrained(
        options.encoder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    side = processor.crop_size["height"]
    augment = v2.Compose([v2.RandomResizedCrop(side, scale=(0.35, 1)), v2.RandomHorizontalFlip()])

    def training_batch(rows: dict) -> dict:
        images = [augment(image.convert("RGB")) for image in rows["image"]]
        return {**processor(images, do_resize=False, return_tensors="pt"), "labels": rows["label"]}

    def test_batch(rows: dict) -> dict:
        return {**processor(rows["image"], return_tensors="pt"), "labels": rows["label"]}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # a share of the steps
            weight_decay=0.05,
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
        ),
        train_dataset=dataset["train"].with_transform(training_batch),
        eval_dataset=dataset["test"].with_transform(test_batch),
        processing_class=processor,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))},
    )
    trainer.train()
    trainer.save_model()
    print(json.dumps({"accuracy": trainer.evaluate()["eval_accuracy"], "output": options.output}))


if __name__ == "__main__":
    main()
