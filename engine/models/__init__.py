"""Models, one small file per architecture, over the layers of engine/layers."""
