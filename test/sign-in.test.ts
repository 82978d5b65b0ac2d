/** The whole way from a URL to a tool's answer: the real server, the stand-in tenant, two kinds of client. */
import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { type OAuthClientProvider, UnauthorizedError } from "@modelcontextprotocol/sdk/client/auth.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import type { OAuthClientInformationMixed, OAuthTokens } from "@modelcontextprotocol/sdk/shared/auth.js";
import { Connector, type ConnectorOptions, publishClientMetadata } from "./support/chatgpt.ts";
import { startServer } from "./support/server.ts";
import {
  ALICE,
  BOB,
  configuredTenant,
  OIDC_SCOPES,
  signIn,
  startTenant,
  type TenantKind,
  type User,
} from "./support/tenant.ts";

const KINDS: TenantKind[] = ["permissive", "strict"];

/** The server and a tenant that is configured for it as the README says. */
async function start(t: TestContext, kind: TenantKind, env: Record<string, string> = {}) {
  const tenant = await startTenant({ kind });
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, DATABASE_URL: "memory:", ...env });
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant(kind, server.url));
  return { tenant, url: server.url };
}

async function link(
  t: TestContext,
  mcpServerUrl: string,
  user: User,
  options: Partial<ConnectorOptions> = {},
): Promise<Connector> {
  const connector = new Connector({ mcpServerUrl, browser: (url) => signIn(url, user), ...options });
  t.after(() => connector.close());
  await connector.link();
  return connector;
}

async function titles(connector: Connector): Promise<string[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  return (structuredContent as { tasks: { title: string }[] }).tasks.map(({ title }) => title);
}

for (const kind of KINDS) {
  // On a strict tenant there is no ID token to be had: README, Step 7.
  const oidcEnabled = kind === "permissive";

  test(`ChatGPT links the server by its URL alone on a ${kind} tenant`, async (t) => {
    const { url } = await start(t, kind);
    const hops: number[] = [];
    const connector = await link(t, url, ALICE, { oidcEnabled, observe: (hop) => hops.push(hop.number) });
    assert.deepEqual(hops, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert.equal(connector.profile.id, ALICE.sub);
    assert.deepEqual(connector.tools.map(({ name }) => name).toSorted(), [
      "create_task",
      "delete_task",
      "get_profile",
      "list_tasks",
      "update_task",
    ]);
  });

  test(`two users of a ${kind} tenant see their own tasks only`, async (t) => {
    const { url } = await start(t, kind);
    const alice = await link(t, url, ALICE, { oidcEnabled });
    const bob = await link(t, url, BOB, { oidcEnabled });
    await alice.callTool("create_task", { title: "Alice's" });
    await bob.callTool("create_task", { title: "Bob's" });
    assert.deepEqual(await titles(alice), ["Alice's"]);
    assert.deepEqual(await titles(bob), ["Bob's"]);
  });

  test(`a refreshed token of a ${kind} tenant reaches the same user's tasks, a stolen one ends the access`, async (t) => {
    const { url } = await start(t, kind);
    const connector = await link(t, url, ALICE, { oidcEnabled });
    await connector.callTool("create_task", { title: "Still there" });
    const first = { ...connector.tokens };
    await connector.refresh();
    assert.notEqual(connector.tokens.refresh_token, first.refresh_token);
    assert.equal(connector.tokens.scope, first.scope);
    assert.deepEqual(await titles(connector), ["Still there"]);
    const second = { ...connector.tokens };
    Object.assign(connector.tokens, first);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
    Object.assign(connector.tokens, second);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
  });

  test(`the SDK's own client signs in on a ${kind} tenant, and refreshes when a token has expired`, async (t) => {
    const { tenant, url } = await start(t, kind);
    const provider = new Provider();
    await connect(t, url, provider, ALICE);
    const { refresh_token } = provider.tokens() ?? {};
    provider.saveTokens({
      ...provider.tokens(),
      access_token: await tenant.sign({ exp: 1 }),
      token_type: "Bearer",
    });
    const client = await connect(t, url, provider);
    const { structuredContent } = await client.callTool({ name: "get_profile" });
    assert.deepEqual(structuredContent, { id: ALICE.sub });
    assert.notEqual(provider.tokens()?.refresh_token, refresh_token);
  });

  test(`with ENFORCE_SCOPES the SDK's client asks a ${kind} tenant for what the tools need`, async (t) => {
    const { url } = await start(t, kind, { ENFORCE_SCOPES: "true" });
    const provider = new Provider();
    const client = await connect(t, url, provider, ALICE);
    assert.deepEqual(provider.tokens()?.scope?.split(" ").toSorted(), [
      "offline_access",
      "tasks:read",
      "tasks:write",
    ]);
    const { isError } = await client.callTool({ name: "create_task", arguments: { title: "Allowed" } });
    assert.notEqual(isError, true);
  });
}

test("ChatGPT asks for all that the tenant advertises, and is granted exactly that", async (t) => {
  const { url } = await start(t, "permissive");
  const { tokens } = await link(t, url, ALICE);
  assert.deepEqual(tokens.scope?.split(" ").toSorted(), OIDC_SCOPES.toSorted());
});

test("ChatGPT links through a client metadata document once it is imported", async (t) => {
  const { tenant, url } = await start(t, "strict");
  tenant.settings.clientIdMetadataDocumentRegistration = true;
  const document = await publishClientMetadata();
  t.after(document.close);
  const options = { oidcEnabled: false, clientMetadataUrl: document.url };
  await assert.rejects(link(t, url, ALICE, options), /Unknown client: http.*client\.json/);
  await tenant.importFromUrl(document.url);
  assert.equal((await link(t, url, ALICE, options)).profile.id, ALICE.sub);
});

test("with ENFORCE_SCOPES ChatGPT signs in again when a tool asks for it, and may then use it", async (t) => {
  const { url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  const connector = await link(t, url, ALICE);
  const refused = await connector.callTool("create_task", { title: "Not yet" });
  assert.equal(refused.isError, true);
  const [challenge] = refused._meta?.["mcp/www_authenticate"] as string[];
  assert.match(challenge ?? "", /^Bearer error="insufficient_scope".*scope="[^"]*tasks:write/);
  await connector.link();
  assert.notEqual((await connector.callTool("create_task", { title: "Now" })).isError, true);
  assert.deepEqual(await titles(connector), ["Now"]);
});

test("a permission that comes through RBAC opens the tool without being in scope", async (t) => {
  const { tenant, url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  tenant.settings.users = [{ ...ALICE, permissions: ["tasks:read"] }];
  for (const api of tenant.settings.apis) api.enableRbac = true;
  const connector = await link(t, url, ALICE);
  assert.deepEqual(await titles(connector), []);
  assert.equal((await connector.callTool("create_task", { title: "No" })).isError, true);
});

test("a user who declines leaves ChatGPT with access_denied", async (t) => {
  const { url } = await start(t, "permissive");
  const browser = (authorizeUrl: URL) => signIn(authorizeUrl, ALICE, "decline");
  await assert.rejects(link(t, url, ALICE, { browser }), /access_denied/);
});

test("a machine-to-machine token uses the tools as a user of its own", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  const reply = await fetch(`${tenant.origin}/oauth/token`, {
    method: "POST",
    body: new URLSearchParams({
      grant_type: "client_credentials",
      client_id: "machine",
      client_secret: "machine-secret",
      audience: url,
    }),
  });
  const provider = new Provider();
  provider.saveTokens(await reply.json());
  const client = await connect(t, url, provider);
  const { structuredContent } = await client.callTool({ name: "get_profile" });
  assert.deepEqual(structuredContent, { id: "machine@clients" });
});

/** What an application on the SDK's client has to bring along: a place for its tokens, and a browser. */
class Provider implements OAuthClientProvider {
  readonly redirectUrl = "http://localhost:1/callback";
  readonly clientMetadata = { client_name: "SDK", redirect_uris: [this.redirectUrl] };
  authorizationUrl: URL | undefined;
  #client: OAuthClientInformationMixed | undefined;
  #tokens: OAuthTokens | undefined;
  #verifier = "";

  clientInformation() {
    return this.#client;
  }
  saveClientInformation(client: OAuthClientInformationMixed) {
    this.#client = client;
  }
  tokens() {
    return this.#tokens;
  }
  saveTokens(tokens: OAuthTokens) {
    this.#tokens = tokens;
  }
  redirectToAuthorization(url: URL) {
    this.authorizationUrl = url;
  }
  codeVerifier() {
    return this.#verifier;
  }
  saveCodeVerifier(verifier: string) {
    this.#verifier = verifier;
  }
}

/** Connects the SDK's client; with `user`, expects to be sent to the sign-in page first. */
async function connect(t: TestContext, url: string, provider: Provider, user?: User): Promise<Client> {
  const client = new Client({ name: "SDK", version: "1.0.0" });
  t.after(() => client.close());
  const transport = () => new StreamableHTTPClientTransport(new URL(url), { authProvider: provider });
  if (user) {
    const first = transport();
    await assert.rejects(client.connect(first), UnauthorizedError);
    const callback = await signIn(provider.authorizationUrl ?? "", user);
    await first.finishAuth(callback.searchParams.get("code") ?? "");
  }
  await client.connect(transport());
  return client;
}
