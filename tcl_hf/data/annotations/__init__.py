"""Annotation files of the tasks, read into tables of records: one module for each family of formats.

| module            | reader                | data sets                                          |
|-------------------|-----------------------|----------------------------------------------------|
| `questions`       | `load_questions`      | VQA v2, Visual Genome (in ALBEF's lists)           |
| `entailment`      | `load_entailment`     | SNLI-VE                                            |
| `reasoning`       | `load_reasoning`      | NLVR2                                              |
| `phrases`         | `load_phrases`        | RefCOCO, RefCOCO+, Flickr30k Entities              |
| `classification`  | `load_classification` | ImageNet, CIFAR, folders of class folders          |
| `refcoco`         |                       | the folder of RefCOCO or RefCOCO+, its pickle      |
| `flickr_entities` |                       | the folder of Flickr30k Entities                   |
| `rows`            |                       | a row of any file, its fields and its place        |
| `images`          |                       | where the images of rows are found                 |
| `sources`         |                       | from files, folders and tables to rows and records |
"""
