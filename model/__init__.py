"""pix2pix on a dataset version: networks, data, losses, training, evaluation. Imports `ixi_etl`, and no Prefect."""
