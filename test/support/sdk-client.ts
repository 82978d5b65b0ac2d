/** The SDK's own client, as an application that is built on it signs a user in. */
import { type OAuthClientProvider, UnauthorizedError } from "@modelcontextprotocol/sdk/client/auth.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import type { OAuthClientInformationMixed, OAuthTokens } from "@modelcontextprotocol/sdk/shared/auth.js";
import { signIn, type User } from "./tenant.ts";

/** What such an application provides: storage for its tokens, and a browser. */
export class Provider implements OAuthClientProvider {
  readonly redirectUrl = "http://localhost:1/callback";
  readonly clientMetadata = { client_name: "SDK", redirect_uris: [this.redirectUrl] };
  authorizationUrl: URL | undefined;
  #client: OAuthClientInformationMixed | undefined;
  #tokens: OAuthTokens | undefined;
  #verifier = "";

  readonly clientInformation = () => this.#client;
  readonly saveClientInformation = (client: OAuthClientInformationMixed) => void (this.#client = client);
  readonly tokens = () => this.#tokens;
  readonly saveTokens = (tokens: OAuthTokens) => void (this.#tokens = tokens);
  readonly redirectToAuthorization = (url: URL) => void (this.authorizationUrl = url);
  readonly codeVerifier = () => this.#verifier;
  readonly saveCodeVerifier = (verifier: string) => void (this.#verifier = verifier);
}

/** Connects; with `user`, expects to be sent to the sign-in page first. The caller closes the client. */
export async function connect(url: string, provider: Provider, user?: Pick<User, "email">): Promise<Client> {
  const client = new Client({ name: "SDK", version: "1.0.0" });
  const transport = () => new StreamableHTTPClientTransport(new URL(url), { authProvider: provider });
  if (user) {
    const first = transport();
    await client.connect(first).then(
      () => Promise.reject(new Error("Connected without a sign-in")),
      (error: unknown) => {
        if (!(error instanceof UnauthorizedError)) throw error;
      },
    );
    const callback = await signIn(provider.authorizationUrl ?? "", user);
    await first.finishAuth(callback.searchParams.get("code") ?? "");
  }
  await client.connect(transport());
  return client;
}
