"""From what runs left on disk to a record, and a judgement of anyone's. Reads files; never loads a model."""
